"""Addresses: inproc:// in tests, ipc:// on one host, tcp:// with CURVE between hosts."""

from __future__ import annotations

import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from cloven.errors import BadInput, PeerRefused, RunError

_LONGEST_IPC_PATH = 107  # bytes of sockaddr_un.sun_path, less the final zero
_TCP = re.compile(r"tcp://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+|\*):([0-9]{1,5})")


@dataclass(frozen=True)
class Address:
    """A checked address; `path` is the socket of an ipc address."""

    text: str
    scheme: str
    path: Path | None = None

    def __str__(self) -> str:
        return self.text


def parse_address(text: str) -> Address:
    """Check the form of an address.

    Raises:
        BadInput: anything but inproc://NAME, ipc://PATH or tcp://HOST:PORT.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("inproc", "ipc", "tcp") or not rest or any(ord(c) < 33 for c in text):
        raise BadInput(f"{text!r} is no address: use ipc://PATH on one host or tcp://HOST:PORT between hosts")
    if scheme == "ipc":
        if rest.startswith("@") or not rest.startswith("/"):
            raise BadInput(f"{text!r}: an ipc address needs an absolute path (abstract sockets have no permissions)")
        if len(rest.encode()) > _LONGEST_IPC_PATH:
            raise BadInput(f"{text!r}: the path is longer than the {_LONGEST_IPC_PATH} bytes a socket may have; use a shorter one")
        return Address(text, scheme, Path(rest))
    if scheme == "tcp":
        match = _TCP.fullmatch(text)
        if match is None or not 0 < int(match[2]) < 65536:
            raise BadInput(f"{text!r} is no tcp address: use tcp://HOST:PORT")
    return Address(text, scheme)


def check_socket_folder(address: Address, *, create: bool) -> None:
    """Require that only this user can reach an ipc address: its folder is ours and has mode 0700.

    Args:
        create: make the folder if it is missing (for the side that listens).

    Raises:
        PeerRefused: others could reach the socket, or put another in its place.
    """
    if address.path is None:
        return
    folder = address.path.parent
    if create:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{folder}: cannot be made: {error.strerror}") from error
    try:
        status = folder.stat()
    except OSError:
        return  # nobody listens there; the connection will say so
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PeerRefused(f"{folder}: others can reach sockets in this folder; use one of your own with mode 0700")
    if address.path.exists() and address.path.stat().st_uid != os.getuid():
        raise PeerRefused(f"{address.path}: another user's socket")


def require_free_path(address: Address) -> None:
    """Refuse an ipc path where something else is, or where somebody listens: libzmq would unlink a socket without asking.

    Raises:
        BadInput: there is a file that is no socket.  RunError: a server listens there.
    """
    if address.path is None or not address.path.exists():
        return
    if not address.path.is_socket():
        raise BadInput(f"{address}: there is a file at that path, and it is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(address.path))
        except OSError:
            return  # left behind by a dead worker
    raise RunError(f"cannot listen at {address}: another server listens there already")
