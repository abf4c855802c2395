"""CURVE keys as files: one secret per party, the worker's key pinned by the trusted side, an allow-list at the worker.

    DIR/trusted/key.json           the trusted side's key pair, mode 0600
    DIR/trusted/worker.json        the worker's public key, pinned
    DIR/worker/key.json            the worker's key pair, mode 0600
    DIR/worker/allowed/*.json      public keys that may connect; read anew for every connection, so that removing a file revokes it

Each party gets its own folder and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from cloven.errors import BadInput, PeerRefused

VERSION = 1
_FORMAT = "cloven-key"
_MAX_FILE_BYTES = 4096
MAX_ALLOWED = 10_000


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, Z85 encoded; `secret` stays out of `repr`."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class TrustedKeys:
    """What the trusted side needs for a CURVE connection: its own pair and the pinned key of the worker."""

    own: KeyPair
    worker: bytes


@dataclass(frozen=True)
class WorkerKeys:
    """What the worker needs: its own pair, and the folder with the public keys that may connect."""

    own: KeyPair
    allowed_folder: Path

    def allowed(self) -> frozenset[bytes]:
        """The public keys (32 raw bytes each) that may connect now; unreadable files are errors, never permissions."""
        files = sorted(self.allowed_folder.glob("*.json"))
        if len(files) > MAX_ALLOWED:
            raise BadInput(f"{self.allowed_folder}: more than {MAX_ALLOWED} keys")
        return frozenset(z85.decode(_read(path, with_secret=False)["public"]) for path in files)


def _write(path: Path, content: dict[str, str], mode: int) -> None:
    record = {"format": _FORMAT, "version": VERSION, **content}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1) + "\n")


def _read(path: Path, *, with_secret: bool) -> dict[str, str]:
    try:
        status = path.stat()
        if status.st_size > _MAX_FILE_BYTES:
            raise BadInput(f"{path}: {status.st_size} bytes is no key file")
        if with_secret and (stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid != os.getuid()):
            raise PeerRefused(f"{path}: a secret key must belong to you and be closed to others: run chmod 600 {path}")
        for place in (path, path.parent):
            if place.stat().st_mode & 0o022:
                raise PeerRefused(f"{place}: others could replace keys there: run chmod go-w {place}")
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such key file; `cloven keygen DIR` makes DIR/worker and DIR/trusted") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable key file") from error
    expected = {"format", "version", "public"} | ({"secret"} if with_secret else set())
    if not isinstance(record, dict) or set(record) != expected or record["format"] != _FORMAT or record["version"] != VERSION:
        raise BadInput(f"{path}: not a cloven key file of version {VERSION}" + ("" if with_secret else " holding a public key only"))
    for name in expected - {"format", "version"}:
        value = record[name]
        if not isinstance(value, str) or len(value) != 40 or len(_z85(value, path)) != 32:
            raise BadInput(f"{path}: '{name}' is not a Z85 key of 40 characters")
    return record


def _z85(text: str, path: Path) -> bytes:
    try:
        return z85.decode(text)
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        raise BadInput(f"{path}: not a Z85 key") from error


def _read_pair(path: Path) -> KeyPair:
    record = _read(path, with_secret=True)
    pair = KeyPair(record["public"].encode(), record["secret"].encode())
    if zmq.curve_public(pair.secret) != pair.public:
        raise BadInput(f"{path}: the public key does not belong to the secret key")
    return pair


def generate_keys(folder: Path) -> None:
    """Make both parties' keys below `folder`; refuses to overwrite.

    Raises:
        BadInput: there are keys already, or the folder cannot be written.

    Guarantee: fresh Curve25519 keys from libzmq's system generator; secret files have mode 0600, their folders 0700. Not hidden from
    whoever can read as this user.
    """
    trusted, worker = folder / "trusted", folder / "worker"
    if trusted.exists() or worker.exists():
        raise BadInput(f"{folder}: holds keys already; choose another folder, or remove {trusted} and {worker} first")
    pairs = {name: KeyPair(*zmq.curve_keypair()) for name in ("trusted", "worker")}
    try:
        for path in (trusted, worker, worker / "allowed"):
            path.mkdir(parents=True, mode=0o700)
        for path, pair in ((trusted, pairs["trusted"]), (worker, pairs["worker"])):
            _write(path / "key.json", {"public": pair.public.decode(), "secret": pair.secret.decode()}, 0o600)
        _write(trusted / "worker.json", {"public": pairs["worker"].public.decode()}, 0o600)
        _write(worker / "allowed" / "trusted.json", {"public": pairs["trusted"].public.decode()}, 0o600)
    except OSError as error:
        raise BadInput(f"{folder}: cannot write keys there: {error.strerror}") from error


def generate_client(folder: Path, server: Path) -> Path:
    """Make the keys of one more client below `folder`, and admit it at a server whose keys there are.

    Args:
        folder: gets `trusted/`.
        server: the server's folder of keys (or the folder above it).

    Returns:
        The file that admits the client.

    Raises:
        BadInput: there are keys already, or a folder cannot be written.
    """
    pinned, trusted = worker_keys(server).own.public, folder / "trusted"
    if trusted.exists():
        raise BadInput(f"{folder}: holds keys already; choose another folder, or remove {trusted} first")
    pair = KeyPair(*zmq.curve_keypair())
    admitted = (server / "worker" if (server / "worker").is_dir() else server) / "allowed" / f"{z85.decode(pair.public).hex()}.json"
    try:
        trusted.mkdir(parents=True, mode=0o700)
        _write(trusted / "key.json", {"public": pair.public.decode(), "secret": pair.secret.decode()}, 0o600)
        _write(trusted / "worker.json", {"public": pinned.decode()}, 0o600)
        _write(admitted, {"public": pair.public.decode()}, 0o600)
    except OSError as error:
        shutil.rmtree(trusted, ignore_errors=True)
        raise BadInput(f"{folder}: cannot write keys there: {error.strerror}") from error
    return admitted


def trusted_keys(folder: Path) -> TrustedKeys:
    """Read the trusted side's folder (or the folder above it, as `cloven keygen` made it)."""
    folder = folder / "trusted" if (folder / "trusted").is_dir() else folder
    pinned = _read(folder / "worker.json", with_secret=False)["public"].encode()
    return TrustedKeys(_read_pair(folder / "key.json"), pinned)


def worker_keys(folder: Path) -> WorkerKeys:
    """Read the worker's folder (or the folder above it, as `cloven keygen` made it)."""
    folder = folder / "worker" if (folder / "worker").is_dir() else folder
    keys = WorkerKeys(_read_pair(folder / "key.json"), folder / "allowed")
    if not keys.allowed():
        raise BadInput(f"{keys.allowed_folder}: no keys; nobody could connect")
    return keys
