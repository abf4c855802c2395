"""API keys: a file with one key per line, of which only hashes stay in memory."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from pathlib import Path

from cloven.errors import BadInput, PeerRefused
from cloven.serving.api_error import ApiError

SHORTEST, _LONGEST, _MOST = 20, 256, 10_000
_LARGEST_FILE = 4 * 2**20


class ApiKeys:
    """Keys that clients may use.

    Guarantee: which key, and how much of it, a wrong one resembles does not show in the time of the refusal. Not hidden: keys are sent by
    the clients as they are, so use TLS outside this machine.
    """

    def __init__(self, keys: list[str]) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def __repr__(self) -> str:
        return f"ApiKeys(<{len(self._hashes)} keys>)"

    def require(self, authorization: bytes) -> None:
        """Check a request's Authorization header.

        Raises:
            ApiError: 401.
        """
        kind, _, key = authorization.partition(b" ")
        given, known = _hash(key.strip()), 0
        for one in self._hashes:  # all of them, whichever it is
            known |= hmac.compare_digest(given, one)
        if kind.lower() != b"bearer" or not known:
            raise ApiError(401, "give an API key of this server: Authorization: Bearer KEY", "invalid_api_key")


def read_api_keys(path: Path) -> ApiKeys:
    """The keys of a file: one per line, empty lines and lines that begin with # are skipped.

    Raises:
        BadInput: no file, no keys, or a key that is short or has blanks in it.
        PeerRefused: others can read the file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            raise BadInput(f"{path}: is no file of API keys")
        if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid != os.getuid():
            raise PeerRefused(f"{path}: API keys must belong to you and be closed to others: run chmod 600 {path}")
        lines = path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; write one API key per line into it, from `openssl rand -hex 32` say") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as API keys, one per line, in ASCII") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    keys = [(number, key) for number, key in numbered if key and not key.startswith("#")]
    if not keys or len(keys) > _MOST:
        raise BadInput(f"{path}: holds {len(keys)} API keys; give 1 to {_MOST}")
    for number, key in keys:
        if not SHORTEST <= len(key) <= _LONGEST or not key.isprintable() or " " in key:
            raise BadInput(f"{path}, line {number}: an API key has {SHORTEST} to {_LONGEST} characters, without blanks")
    return ApiKeys([key for _, key in keys])


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
