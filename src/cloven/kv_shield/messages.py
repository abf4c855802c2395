"""The enclave's messages: see `cloven.wire.schema` for what all wires share.

    open     {id, bundle, sequences}                                        -> opened   {id, session}
    key      {id, bundle, session, layer, batch, rows, first, dtype} + x    -> keyed    {id, batch, rows} + x'
    restore  {id, bundle, session, layer, batch, rows, dtype} + a'          -> restored {id, batch, rows} + a
    close    {id, bundle, session}                                          -> closed   {id}

The payload of `key` is the positions, int32 [batch, rows] (−1: a pad), then q ‖ k (‖ v in session mode) [batch, rows, W]; `first` is the
place of its first row in the cache. Tensors are little-endian, row-major. `session` is 16 bytes; zeros in permute mode, which keeps none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloven.wire.limits import MAX_PAYLOAD_BYTES
from cloven.wire.schema import MalformedMessage, Schema, valid_count

SESSION_BYTES = 16
NO_SESSION = bytes(SESSION_BYTES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_BATCH = 4096
MAX_POSITION = 2**30


@dataclass(frozen=True)
class Open:
    """Asks for keys for that many sequences."""

    id: int
    bundle: bytes
    sequences: int


@dataclass(frozen=True)
class Opened:
    """The session's name, unguessable."""

    id: int
    session: bytes


@dataclass(frozen=True)
class Key:
    """Asks for rotated and keyed rows; positions and rows follow as a frame."""

    id: int
    bundle: bytes
    session: bytes
    layer: int
    batch: int
    rows: int
    first: int
    dtype: str


@dataclass(frozen=True)
class Keyed:
    """The rows follow as a frame."""

    id: int
    batch: int
    rows: int


@dataclass(frozen=True)
class Restore:
    """Asks for the true attention output; the keyed one follows as a frame."""

    id: int
    bundle: bytes
    session: bytes
    layer: int
    batch: int
    rows: int
    dtype: str


@dataclass(frozen=True)
class Restored:
    """The rows follow as a frame."""

    id: int
    batch: int
    rows: int


@dataclass(frozen=True)
class Close:
    """Ends a session: its keys are dropped."""

    id: int
    bundle: bytes
    session: bytes


@dataclass(frozen=True)
class Closed:
    """The session has ended."""

    id: int


def _valid(name: str, value: object) -> bool:
    if name == "session":
        return type(value) is bytes and len(value) == SESSION_BYTES
    if name == "dtype":
        return type(value) is str and value in DTYPES
    if name in ("batch", "sequences"):
        return valid_count(value, lowest=1) and isinstance(value, int) and value <= MAX_BATCH
    if name in ("rows", "first"):
        return valid_count(value, lowest=int(name == "rows")) and isinstance(value, int) and value <= MAX_POSITION
    return valid_count(value)  # layer


ENCLAVE = Schema(
    {
        "open": Open,
        "opened": Opened,
        "key": Key,
        "keyed": Keyed,
        "restore": Restore,
        "restored": Restored,
        "close": Close,
        "closed": Closed,
    },
    (Key, Keyed, Restore, Restored),
    _valid,
)


def frame_of(*tensors: Tensor) -> memoryview:
    """One payload frame of tensors, one after the other."""
    parts = [memoryview(_bytes(tensor)).cast("B") for tensor in tensors]
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()


def tensor_of(frame: memoryview, shape: tuple[int, ...], dtype: torch.dtype, request: int = 0) -> Tensor:
    """Parse a whole frame as one tensor.

    Raises:
        MalformedMessage: wrong size.
    """
    count = 1
    for length in shape:
        count *= length
    if frame.nbytes != count * dtype.itemsize or frame.nbytes > MAX_PAYLOAD_BYTES:
        raise MalformedMessage("size", f"a payload of {frame.nbytes} bytes, expected {count * dtype.itemsize}", request)
    writable = frame if not frame.readonly else bytearray(frame)
    return torch.frombuffer(writable, dtype=dtype).view(shape)
