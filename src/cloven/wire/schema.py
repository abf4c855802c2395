"""How messages look on every wire of cloven: a msgpack header and at most one raw frame; strict schema, exact version, no negotiation.

    hello     {v, type, id, bundle}            -> welcome {v, type, id, bundle, groups, holds}
    lane      {v, type, id, bundle}            -> laned   {v, type, id, segment}
    serve     {v, type, id, bundle}            -> serving {v, type, id, most}            some schemes
    …         what the scheme adds             -> error   {v, type, id, code, text}

A `Schema` knows a scheme's messages. `id` numbers the requests of a session; an answer repeats it, so that a late answer can be told and
dropped. `bundle` is the 16-byte bundle id. After `serving` with `most` > 0, sent over a lane, up to so many rows are asked for there
without headers (`cloven.worker.lane_products`), until another message comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from cloven.errors import ClovenError
from cloven.wire.limits import MAX_FRAMES, MAX_HEADER_BYTES, MAX_TEXT

VERSION = 5
BUNDLE_ID_BYTES = 16
ERROR_CODES = ("malformed", "version", "bundle", "group", "size", "session", "budget", "ledger", "internal")
_SEGMENT = re.compile(r"(cloven-[0-9a-f]{32})?")
_PART = re.compile(r"(layers|rows):[1-9][0-9]{0,3}/[1-9][0-9]{0,3}")


class MalformedMessage(ClovenError):
    """Bytes that are no message of this version; `code` is one of ERROR_CODES, `request` the id to answer to (0: unknown)."""

    def __init__(self, code: str, text: str, request: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.request = request


@dataclass(frozen=True)
class Hello:
    """Asks whether the server holds a bundle."""

    id: int
    bundle: bytes


@dataclass(frozen=True)
class Welcome:
    """The server holds the bundle, with this many groups; `holds`: which part of them, "" for all (see `cloven.bundle.placement`)."""

    id: int
    bundle: bytes
    groups: int
    holds: str = ""


@dataclass(frozen=True)
class AskLane:
    """Asks for shared memory, on one host: see `cloven.wire.lane`."""

    id: int
    bundle: bytes


@dataclass(frozen=True)
class Laned:
    """The name of the shared memory; "" where there is none."""

    id: int
    segment: str


@dataclass(frozen=True)
class Serve:
    """Asks for answers over this lane without headers: to a group's number, the number of rows, and the rows."""

    id: int
    bundle: bytes


@dataclass(frozen=True)
class Serving:
    """How many rows may be asked for at once; 0: none."""

    id: int
    most: int


SERVES: dict[str, type] = {"serve": Serve, "serving": Serving}  # of a scheme whose servers do that


@dataclass(frozen=True)
class ErrorAnswer:
    """Why there is no other answer."""

    id: int
    code: str
    text: str


_COMMON: dict[str, type] = {"hello": Hello, "welcome": Welcome, "lane": AskLane, "laned": Laned, "error": ErrorAnswer}


def valid_count(value: object, lowest: int = 0) -> bool:
    """Whether a field is an integer that fits in 63 bits."""
    return type(value) is int and lowest <= value < 2**63


def _valid_common(name: str, value: object) -> bool | None:
    if name in ("id", "groups", "most"):
        return valid_count(value)
    if name == "bundle":
        return type(value) is bytes and len(value) == BUNDLE_ID_BYTES
    if name == "code":
        return type(value) is str and value in ERROR_CODES
    if name == "holds":
        return type(value) is str and (value == "" or _PART.fullmatch(value) is not None)
    if name == "segment":
        return type(value) is str and _SEGMENT.fullmatch(value) is not None
    if name == "text":
        return type(value) is str and len(value) <= MAX_TEXT
    return None


class Schema:
    """The messages of one scheme, besides those that all schemes have.

    Args:
        types: frozen dataclasses by the name on the wire; every one has an `id`.
        with_payload: those that carry a raw frame.
        valid: whether a value is allowed for a field that not all schemes have.
    """

    def __init__(self, types: Mapping[str, type], with_payload: tuple[type, ...], valid: Callable[[str, object], bool]) -> None:
        self._types: dict[str, type] = _COMMON | dict(types)
        self._names = {cls: name for name, cls in self._types.items()}
        self._with_payload = with_payload
        self._valid_own = valid
        self.serves = Serve in self._names

    def pack(self, message: Any) -> bytes:
        """The header frame of a message."""
        return bytes(msgpack.packb({"v": VERSION, "type": self._names[type(message)], **vars(message)}))

    def unpack(self, frames: list[Any]) -> tuple[Any, memoryview | None]:
        """Parse the frames of one message.

        Args:
            frames: buffers, header first.

        Returns:
            The message, and the payload's buffer where the type has one (its size is not yet checked).

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
        request: int = fields["id"] if valid_count(fields.get("id")) else 0
        version = fields.pop("v", None)
        if type(version) is not int or version != VERSION:
            raise MalformedMessage("version", f"this side speaks wire version {VERSION} only", request)
        name = fields.pop("type", None)
        cls: Any = self._types.get(name) if isinstance(name, str) else None
        if cls is None or set(fields) != set(cls.__dataclass_fields__):
            raise MalformedMessage("malformed", "unknown type, or missing or unknown fields", request)
        if not all(self._valid(key, value) for key, value in fields.items()):
            raise MalformedMessage("malformed", "a field has the wrong type or is out of range", request)
        if (len(frames) == 2) != (cls in self._with_payload):
            raise MalformedMessage("malformed", "a payload is missing or not expected", request)
        return cls(**fields), memoryview(frames[1]) if len(frames) == 2 else None

    def _valid(self, name: str, value: object) -> bool:
        common = _valid_common(name, value)
        return self._valid_own(name, value) if common is None else common
