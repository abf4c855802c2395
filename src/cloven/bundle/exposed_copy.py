"""The trusted side's own copy of exposed/: hashed when first read, a memory map afterwards.

The trusted side never takes the exposed matrices unchecked from the worker: if the worker and S·W read the same altered W, every
check would pass. `verified` hashes the very bytes that it returns. `mapped` does not hash: it is for making pads, each of which is
checked against the S·W of the verified bytes, so that an altered file is caught there.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cloven.bundle.manifest import MANIFEST, ExposedManifest
from cloven.bundle.shards import map_matrix
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.bundle.verification import verify_matrix
from cloven.errors import BadBundle


class ExposedCopy:
    """Access to the matrices of OUT/exposed for the trusted side.

    Args:
        folder: the copy.
        manifest: the trusted half's manifest, which holds the hashes.

    Raises:
        BadBundle: no such folder.  ForeignBundle: it is the exposed half of another bundle.
    """

    def __init__(self, folder: Path, manifest: TrustedManifest) -> None:
        if not (folder / MANIFEST).is_file():
            raise BadBundle(f"{folder}: the trusted side needs its own copy of exposed/ there; give its place with --exposed PATH")
        manifest.require_same_bundle(ExposedManifest.read(folder), folder)
        self._folder, self._groups = folder, manifest.exposed.groups

    def verified(self, group: int) -> Tensor:
        """A private copy of a group's matrix, int8 [rows, columns], whose bytes have the trusted manifest's hash."""
        matrix = self.mapped(group).clone()
        verify_matrix(matrix, self._groups[group].sha256, f"{self._folder / self._groups[group].file}, {self._groups[group].tensor}")
        return matrix

    def mapped(self, group: int) -> Tensor:
        """A memory map of a group's matrix, int8 [rows, columns], unverified."""
        record = self._groups[group]
        return map_matrix(self._folder / record.file, record.tensor, record.rows, record.columns)
