"""The exposed matrices that a worker serves: memory-mapped, verified once at start, placed for the exact product."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cloven.bundle.manifest import ExposedManifest
from cloven.bundle.placement import WHOLE, Part, parts
from cloven.bundle.shards import map_matrix
from cloven.bundle.verification import verify_files
from cloven.errors import BadBundle
from cloven.field.products import Backend, PlacedMatrix, multiply
from cloven.field.selection import select_backend


@dataclass(frozen=True)
class Matrices:
    """Matrices of one bundle, by group number; None where this worker's part holds nothing of a group."""

    bundle: bytes
    backend: Backend
    groups: tuple[PlacedMatrix | None, ...]

    @classmethod
    def load(cls, folder: Path, device: str, part: Part = WHOLE) -> Matrices:
        """Open OUT/exposed for serving; of files that hold nothing of the part, none is needed.

        Raises:
            BadBundle: not an exposed half, or a matrix holds −128 (outside what the product is exact for).
            TamperedBundle: a file differs from the manifest.
        """
        manifest = ExposedManifest.read(folder)
        if part.kind:
            parts(part.kind, part.of, manifest.groups)  # or there is no such part
        held = [part.rows(index, manifest.groups) for index in range(len(manifest.groups))]
        needed = {group.file for group, rows in zip(manifest.groups, held, strict=True) if rows}
        verify_files(folder, {name: digest for name, digest in manifest.files.items() if name in needed})
        backend = select_backend(device)
        placed: list[PlacedMatrix | None] = []
        for group, rows in zip(manifest.groups, held, strict=True):
            if not rows:
                placed.append(None)
                continue
            codes = map_matrix(folder / group.file, group.tensor, group.rows, group.columns)[rows.start : rows.stop]
            if int(codes.min()) == -128:
                raise BadBundle(f"{folder / group.file}: {group.tensor} holds -128, outside [-127, 127]")
            placed.append(backend.place(codes))
        return cls(bytes.fromhex(manifest.bundle), backend, tuple(placed))

    @torch.no_grad()
    def multiply(self, group: int, c: Tensor) -> Tensor:
        """z = c Wᵀ mod p: int32 [M, K] -> int32 [M, N] on the CPU."""
        w = self.groups[group]
        assert w is not None, "the service asks for what is held"
        return multiply(self.backend, c, w).cpu()
