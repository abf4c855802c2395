"""Messages: a msgpack header and at most one raw tensor frame; strict schema, exact version, no negotiation.

    hello     {v, type, id, bundle}                       -> welcome {v, type, id, bundle, groups}
    multiply  {v, type, id, bundle, group, rows} + c      -> product {v, type, id, rows} + z
                                                          -> error   {v, type, id, code, text}

c is [rows, K] and z is [rows, N]: int32, little-endian, row-major, centred residues. `id` numbers the requests of a session; an
answer repeats it, so that a late answer can be told and dropped. `bundle` is the 16-byte bundle id: every request is complete in
itself, the worker keeps no state between requests, and a worker that was restarted goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from cloven.errors import ClovenError
from cloven.field.residues import is_residue
from cloven.wire.limits import MAX_FRAMES, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_TEXT

VERSION = 1
BUNDLE_ID_BYTES = 16
ERROR_CODES = ("malformed", "version", "bundle", "group", "size", "internal")


class MalformedMessage(ClovenError):
    """Bytes that are no message of this version; `code` is one of ERROR_CODES, `request` the id to answer to (0: unknown)."""

    def __init__(self, code: str, text: str, request: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.request = request


@dataclass(frozen=True)
class Hello:
    """Asks whether the worker holds a bundle."""

    id: int
    bundle: bytes


@dataclass(frozen=True)
class Welcome:
    """The worker holds the bundle, with this many groups."""

    id: int
    bundle: bytes
    groups: int


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


@dataclass(frozen=True)
class ErrorAnswer:
    """Why there is no other answer."""

    id: int
    code: str
    text: str


Message = Hello | Welcome | Multiply | Product | ErrorAnswer

_TYPES: dict[str, type[Message]] = {
    "hello": Hello,
    "welcome": Welcome,
    "multiply": Multiply,
    "product": Product,
    "error": ErrorAnswer,
}
_NAMES = {cls: name for name, cls in _TYPES.items()}
_WITH_PAYLOAD = (Multiply, Product)


def _valid(name: str, value: object) -> bool:
    if name in ("id", "group", "rows", "groups"):
        lowest = 1 if name == "rows" else 0
        return type(value) is int and lowest <= value < 2**63
    if name == "bundle":
        return type(value) is bytes and len(value) == BUNDLE_ID_BYTES
    if name == "code":
        return type(value) is str and value in ERROR_CODES
    return type(value) is str and len(value) <= MAX_TEXT  # text


def pack(message: Message) -> bytes:
    """The header frame of a message."""
    fields = {"v": VERSION, "type": _NAMES[type(message)], **vars(message)}
    return bytes(msgpack.packb(fields))


def unpack(frames: list[Any]) -> tuple[Message, memoryview | None]:
    """Parse the frames of one message.

    Args:
        frames: buffers, header first.

    Returns:
        The message, and the payload's buffer where the type has one (its size is not yet checked against the rows).

    Raises:
        MalformedMessage: anything but a well-formed message of exactly this version.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise MalformedMessage("malformed", f"{len(frames)} frames, expected 1 or 2")
    header = memoryview(frames[0])
    if header.nbytes > MAX_HEADER_BYTES:
        raise MalformedMessage("malformed", f"a header of {header.nbytes} bytes, at most {MAX_HEADER_BYTES} are allowed")
    try:
        fields = msgpack.unpackb(header, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedMessage("malformed", "the header is not msgpack") from error
    if not isinstance(fields, dict):
        raise MalformedMessage("malformed", "the header is not a map")
    request: int = fields["id"] if _valid("id", fields.get("id")) else 0
    version = fields.pop("v", None)
    if type(version) is not int or version != VERSION:
        raise MalformedMessage("version", f"this side speaks wire version {VERSION} only", request)
    name = fields.pop("type", None)
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None or set(fields) != set(cls.__dataclass_fields__):
        raise MalformedMessage("malformed", "unknown type, or missing or unknown fields", request)
    if not all(_valid(key, value) for key, value in fields.items()):
        raise MalformedMessage("malformed", "a field has the wrong type or is out of range", request)
    if (len(frames) == 2) != (cls in _WITH_PAYLOAD):
        raise MalformedMessage("malformed", "a payload is missing or not expected", request)
    return cls(**fields), memoryview(frames[1]) if len(frames) == 2 else None


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
    residues = torch.from_numpy(values if values.flags.writeable else values.copy())
    if not is_residue(residues):
        raise MalformedMessage("malformed", "an entry of the payload is no residue", request)
    return residues
