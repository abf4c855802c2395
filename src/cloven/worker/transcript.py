"""A transcript of what a worker receives: for audits and the demo, and what a curious worker (A1) would keep anyway.

Records, one after the other: group, rows, columns (uint32 each, little-endian), then rows × columns int32 residues.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cloven.errors import BadInput

_HEADER = struct.Struct("<III")


class Transcript:
    """Appends the rows that arrive to a file."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise BadInput(f"{path}: cannot record there: {error.strerror}") from error

    def append(self, group: int, c: Tensor) -> None:
        """Record masked rows c int32 [M, K]."""
        self._file.write(_HEADER.pack(group, *c.shape))
        self._file.write(c.contiguous().numpy().tobytes())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_transcript(path: Path) -> Iterator[tuple[int, Tensor]]:
    """The records of a transcript: (group, residues int32 [M, K])."""
    with path.open("rb") as file:
        while header := file.read(_HEADER.size):
            if len(header) != _HEADER.size:
                raise BadInput(f"{path}: the transcript ends in the middle of a record")
            group, rows, columns = _HEADER.unpack(header)
            values = np.frombuffer(file.read(4 * rows * columns), dtype="<i4")
            if len(values) != rows * columns:
                raise BadInput(f"{path}: the transcript ends in the middle of a record")
            yield group, torch.from_numpy(values.copy()).view(rows, columns)
