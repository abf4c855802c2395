"""The exposed matrices that a worker serves: memory-mapped, verified once at start, placed for the exact product."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cloven.bundle.manifest import ExposedManifest
from cloven.bundle.shards import map_matrix
from cloven.bundle.verification import verify_files
from cloven.errors import BadBundle
from cloven.field.products import Backend, PlacedMatrix, multiply
from cloven.field.selection import select_backend


@dataclass(frozen=True)
class Matrices:
    """Matrices of one bundle, by group number."""

    bundle: bytes
    backend: Backend
    groups: tuple[PlacedMatrix, ...]

    @classmethod
    def load(cls, folder: Path, device: str) -> Matrices:
        """Open OUT/exposed for serving.

        Raises:
            BadBundle: not an exposed half, or a matrix holds −128 (outside what the product is exact for).
            TamperedBundle: a file differs from the manifest.
        """
        manifest = ExposedManifest.read(folder)
        verify_files(folder, manifest.files)
        backend = select_backend(device)
        placed = []
        for group in manifest.groups:
            codes = map_matrix(folder / group.file, group.tensor, group.rows, group.columns)
            if int(codes.min()) == -128:
                raise BadBundle(f"{folder / group.file}: {group.tensor} holds -128, outside [-127, 127]")
            placed.append(backend.place(codes))
        return cls(bytes.fromhex(manifest.bundle), backend, tuple(placed))

    @torch.no_grad()
    def multiply(self, group: int, c: Tensor) -> Tensor:
        """z = c Wᵀ mod p: int32 [M, K] -> int32 [M, N] on the CPU."""
        return multiply(self.backend, c, self.groups[group]).cpu()
