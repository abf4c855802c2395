"""Who may ask, and how much at once: in front of everything else.

1. a Host that is this server's, where only this machine may connect (a web page cannot reach it by another name)
2. an API key, where keys are set; /health needs none, nor do the page's own files, which hold nothing
3. JSON only: a browser does not send that to a foreign server without asking, and it is never answered
4. a body of bounded size and shape, within bounded time
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloven.local_host import named
from cloven.serving.api_error import ApiError
from cloven.serving.api_keys import ApiKeys
from cloven.serving.body import parsed

OPEN = frozenset(("/health",))
_BODY_SECONDS = 30.0


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it; gets the parsed body as `scope["cloven.body"]`.
        keys: who may ask; None: everybody who can connect.
        hosts: names that a Host header may have; None: any.
        most: bytes of a body.
        more_open: paths besides /health that need no key.
        answered: called with the status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys | None,
        hosts: frozenset[str] | None,
        most: int,
        more_open: frozenset[str] = frozenset(),
        answered: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app, self._keys, self._hosts, self._most, self._answered = app, keys, hosts, most, answered
        self._open = OPEN | more_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        send = self._counted(send)
        try:
            self._admit(scope)
            if scope["method"] == "POST":
                scope["cloven.body"] = await self._body(scope, receive)
        except ApiError as error:
            await refusal(error)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        await self._app(scope, receive, send)

    def _counted(self, send: Send) -> Send:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(message["status"])
            await send(message)

        return counting

    def _admit(self, scope: Scope) -> None:
        given: dict[bytes, bytes] = dict(scope["headers"])
        if self._hosts is not None and named(given.get(b"host", b"").decode("latin-1")) not in self._hosts:
            raise ApiError(421, "this server is not reached by that name", "unknown_host")
        if self._keys is not None and scope["path"] not in self._open:
            self._keys.require(given.get(b"authorization", b""))
        if scope["method"] == "POST" and given.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "send Content-Type: application/json", "unsupported_media_type")
        length = given.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request has at most {self._most} bytes here", "request_too_large")

    async def _body(self, scope: Scope, receive: Receive) -> Any:
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                data = await self._read(receive)
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time", "request_timeout") from None
        return parsed(data)

    async def _read(self, receive: Receive) -> bytes:
        data = bytearray()
        more = True
        while more:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            data += message.get("body", b"")
            more = message.get("more_body", False)
            if len(data) > self._most:
                raise self._too_large()
        return bytes(data)


def refusal(error: ApiError) -> Response:
    """The answer with an error."""
    return JSONResponse(error.body(), error.status, error.headers())
