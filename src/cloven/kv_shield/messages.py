"""The enclave's messages: see `cloven.wire.schema` for what all wires share.

    open     {id, bundle, sequences}                                        -> opened   {id, session}
    key      {id, bundle, session, layer, batch, rows, first, dtype} + x    -> keyed    {id, batch, rows} + x'
    restore  {id, bundle, session, layer, batch, rows, dtype} + a'          -> restored {id, batch, rows} + a
    step     {id, bundle, session, batch, rows, first, dtype} + positions   -> stepped  {id, calls}
    seal     {id, bundle, session, layer, part, block, shape, dtype} + rows -> sealed   {id, epoch} + ciphertext
    seal_end {id, bundle, session, blocks}                                  -> seal_ended {id, epoch}
    unseal   {id, bundle, session, epoch, layer, part, block, shape, dtype} + ciphertext -> unsealed {id, left} + rows
    close    {id, bundle, session}                                          -> closed   {id}

The payload of `key` is the positions, int32 [batch, rows] (−1: a pad), then q ‖ k (‖ v in session mode) [batch, rows, W]; `first` is the
place of its first row in the cache. After `step`, through a lane, `calls` rows of every layer's `key` and `restore` follow, without headers
(see `enclave_step`); 0 where this enclave cannot. Tensors are little-endian, row-major. `session` is 16 bytes; zeros in permute mode, which
keeps none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloven.wire.limits import MAX_PAYLOAD_BYTES
from cloven.wire.schema import MalformedMessage, Schema, valid_count

SESSION_BYTES = 16
NO_SESSION = bytes(SESSION_BYTES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
STEP_DTYPES = (torch.float32, torch.bfloat16)  # of a step
STORED_DTYPES = (*DTYPES, "float64", "uint8", "int8", "int16", "int32", "int64", "float8_e4m3fn", "float8_e5m2")  # of sealed tensors
_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
MAX_BLOCK_BYTES = 16 * 2**20  # of a sealed tensor
TAG_BYTES = 16
MAX_BATCH = 4096
MAX_POSITION = 2**30


@dataclass(frozen=True)
class Label:
    """What a block is: bound to its ciphertext."""

    layer: int
    part: str
    block: int
    shape: tuple[int, ...]
    dtype: str


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
class Step:
    """Asks for one pass over all layers; the positions of its rows follow as a frame."""

    id: int
    bundle: bytes
    session: bytes
    batch: int
    rows: int
    first: int
    dtype: str


@dataclass(frozen=True)
class Stepped:
    """The lane is open for so many calls."""

    id: int
    calls: int


@dataclass(frozen=True)
class Seal:
    """Asks for the ciphertext of a block of an idle cache; the block follows as a frame."""

    id: int
    bundle: bytes
    session: bytes
    layer: int
    part: str
    block: int
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Sealed:
    """The ciphertext follows as a frame; `epoch` is the number of the sealing that it is a block of."""

    id: int
    epoch: int


@dataclass(frozen=True)
class SealEnd:
    """All blocks have been sent."""

    id: int
    bundle: bytes
    session: bytes
    blocks: int


@dataclass(frozen=True)
class SealEnded:
    """The sealing's number."""

    id: int
    epoch: int


@dataclass(frozen=True)
class Unseal:
    """Asks for a block back; its ciphertext follows as a frame."""

    id: int
    bundle: bytes
    session: bytes
    epoch: int
    layer: int
    part: str
    block: int
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Unsealed:
    """The block follows as a frame; `left` others are still sealed."""

    id: int
    left: int


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
        return type(value) is str and value in STORED_DTYPES
    if name == "part":
        return type(value) is str and _PART.fullmatch(value) is not None
    if name == "shape":
        return type(value) is list and 1 <= len(value) <= 8 and all(valid_count(length) for length in value)
    if name in ("batch", "sequences"):
        return valid_count(value, lowest=1) and isinstance(value, int) and value <= MAX_BATCH
    if name in ("rows", "first"):
        return valid_count(value, lowest=int(name == "rows")) and isinstance(value, int) and value <= MAX_POSITION
    return valid_count(value)  # layer, block, blocks, left, epoch, calls


ENCLAVE = Schema(
    {
        "open": Open,
        "opened": Opened,
        "key": Key,
        "keyed": Keyed,
        "restore": Restore,
        "restored": Restored,
        "step": Step,
        "stepped": Stepped,
        "seal": Seal,
        "sealed": Sealed,
        "seal_end": SealEnd,
        "seal_ended": SealEnded,
        "unseal": Unseal,
        "unsealed": Unsealed,
        "close": Close,
        "closed": Closed,
    },
    (Key, Keyed, Restore, Restored, Step, Seal, Sealed, Unseal, Unsealed),
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
    tensor = torch.frombuffer(writable, dtype=dtype).view(shape)
    return tensor if tensor.data_ptr() % dtype.itemsize == 0 else tensor.clone()  # a message may lie anywhere; C++ may not
