"""The worker's messages: see `cloven.wire.schema` for what all wires share.

    multiply  {v, type, id, bundle, group, rows} + c      -> product {v, type, id, rows} + z

c is [rows, K] and z is [rows, N]: int32, little-endian, row-major, centred residues. Every request names its bundle and is complete in
itself: the worker keeps no state between requests, and a worker that was restarted goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloven.field.residues import is_residue
from cloven.wire.limits import MAX_PAYLOAD_BYTES
from cloven.wire.schema import SERVES, ErrorAnswer, Hello, MalformedMessage, Schema, Serve, Serving, Welcome, valid_count


@dataclass(frozen=True)
class Multiply:
    """Asks for z = W c mod p with the matrix of a group; c follows as a frame."""

    id: int
    bundle: bytes
    group: int
    rows: int


@dataclass(frozen=True)
class Product:
    """z follows as a frame."""

    id: int
    rows: int


Message = Hello | Welcome | Multiply | Product | Serve | Serving | ErrorAnswer


def _valid(name: str, value: object) -> bool:
    return valid_count(value, lowest=1 if name == "rows" else 0)  # group, rows


WORKER = Schema({"multiply": Multiply, "product": Product, **SERVES}, (Multiply, Product), _valid)
pack, unpack = WORKER.pack, WORKER.unpack


def residue_frame(residues: Tensor) -> memoryview:
    """The payload frame of int32 residues [rows, width] (no copy)."""
    buffer: Any = residues.contiguous().numpy()
    return memoryview(buffer).cast("B")


def residues_of_frame(frame: memoryview, rows: int, width: int, request: int = 0) -> Tensor:
    """Parse a payload frame: int32 [rows, width], checked for size and for the range of residues.

    Raises:
        MalformedMessage: wrong size, or an entry outside [−H, H].
    """
    if frame.nbytes != 4 * rows * width or frame.nbytes > MAX_PAYLOAD_BYTES:
        expected = f"4 x {rows} x {width}, at most {MAX_PAYLOAD_BYTES}"
        raise MalformedMessage("size", f"a payload of {frame.nbytes} bytes, expected {expected}", request)
    values = np.frombuffer(frame, dtype="<i4").reshape(rows, width)
    return require_residues(torch.from_numpy(values if values.flags.writeable else values.copy()), request)


def require_residues(values: Tensor, request: int = 0) -> Tensor:
    """A payload int32 [rows, width], if it holds residues.

    Raises:
        MalformedMessage: an entry is outside [−H, H].
    """
    if not is_residue(values):
        raise MalformedMessage("malformed", "an entry of the payload is no residue", request)
    return values
