"""Which replica a session belongs to: what its client says it is, hashed, and a bounded memory of where it went."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from typing import Generic, TypeVar

from cloven.serving.api_error import bad_request

HEADER = "X-Cloven-Session"
_LONGEST_HEADER = 256
MOST = 65_536  # sessions that are remembered; the one that was not used for longest is forgotten
_T = TypeVar("_T")


class Sessions:
    """Hashes of what sessions are called, under a salt of this process: neither keys nor users are kept."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)

    def __repr__(self) -> str:
        return "Sessions(<secret>)"

    def name(self, authorization: bytes, header: bytes | None, user: object) -> bytes | None:
        """The session that a request belongs to, or None: to none.

        Args:
            authorization: the request's Authorization header: two clients with different keys share no session.
            header: `X-Cloven-Session`, which goes before `user`.
            user: the request's field.

        Raises:
            ApiError: 400, the header is too long.
        """
        if header is not None:
            if not 0 < len(header) <= _LONGEST_HEADER:
                raise bad_request(f"{HEADER}: 1 to {_LONGEST_HEADER} bytes")
            kind, value = b"header", header
        elif isinstance(user, str) and user:
            kind, value = b"user", user.encode("utf-8", "surrogatepass")
        else:
            return None
        key = hmac.digest(self._salt, authorization, hashlib.sha256)  # of one length, so that nothing runs into what follows
        return hmac.digest(self._salt, key + kind + b"\0" + value, hashlib.sha256)


class Places(Generic[_T]):
    """Where sessions went, the last `most` of them."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._places: OrderedDict[bytes, _T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, session: bytes) -> _T | None:
        """Where it went last; counts as a use."""
        place = self._places.get(session)
        if place is not None:
            self._places.move_to_end(session)
        return place

    def put(self, session: bytes, place: _T) -> None:
        """It goes there from now on."""
        self._places[session] = place
        self._places.move_to_end(session)
        if len(self._places) > self._most:
            self._places.popitem(last=False)

    def forget(self, place: _T) -> None:
        """Nobody goes there any longer."""
        for session in [one for one, where in self._places.items() if where is place]:
            del self._places[session]
