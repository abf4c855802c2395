"""The endpoint in front of replicas: who may ask, how many wait, where a request goes; the answer is the replica's, as it comes.

    client ── TLS, API key, limits ──► front ── mutual TLS ──► replica ── masked ──► worker

The front loads no model. It is a trusted process as well: prompts and answers pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cloven.metrics.catalog import Sample
from cloven.serving.api_error import ApiError
from cloven.serving.api_keys import ApiKeys
from cloven.serving.counts import EndpointCounts
from cloven.serving.model import READY
from cloven.serving.options import ServeOptions
from cloven.serving.order import Order, chat_order, completion_order
from cloven.serving.replicas.fleet import Fleet, Replica
from cloven.serving.replicas.sticky import HEADER, Sessions
from cloven.serving.replicas.totals import FRONTS
from cloven.serving.routes import REFUSALS, answered, behind_gate, model_routes

_EVENTS = "text/event-stream"
_FAILED = ("verification_failed", "session_ended")
_Parse = Callable[[Any, str, int], Order]


class Front:
    """The application in front of a fleet.

    Args:
        name: the model's.
        fleet: looked after while the application lives.
        options: limits; `max_queue` is for all replicas together.
    """

    def __init__(self, name: str, fleet: Fleet, options: ServeOptions) -> None:
        self._name, self.fleet, self._options = name, fleet, options
        self._sessions = Sessions()
        self._counts = EndpointCounts(lambda: sum(replica.turns.waiting for replica in list(fleet.live)))

    def application(self, keys: ApiKeys | None) -> ASGIApp:
        """The ASGI application, behind its gate."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            *model_routes(self._name),
            Route("/health", self._health, methods=["GET"]),
        ]
        app = Starlette(routes=routes, exception_handlers=REFUSALS, lifespan=self._life)
        return behind_gate(app, keys, self._options, answered=self._counts.answered)

    def samples(self) -> Iterator[Sample]:
        """Numbers for Prometheus: the front's own, and those of its replicas, added up."""
        yield from (one for one in self._counts.samples() if one.name in FRONTS)
        yield Sample("cloven_replicas", float(self.fleet.wanted))
        yield Sample("cloven_replicas_live", float(sum(replica.answers for replica in list(self.fleet.live))))
        yield from self.fleet.totals.samples()

    def refuse(self) -> None:
        """See `server.Application`."""
        self.fleet.refuse()

    def end_answers(self) -> None:
        """See `server.Application`."""
        self.fleet.end_answers()

    @contextlib.asynccontextmanager
    async def _life(self, _app: Any) -> AsyncIterator[None]:
        self.fleet.begin()
        try:
            yield
        finally:
            await self.fleet.stop()

    async def _chat(self, request: Request) -> Response:
        return await self._respond(request, chat_order)

    async def _complete(self, request: Request) -> Response:
        return await self._respond(request, completion_order)

    async def _respond(self, request: Request, parse: _Parse) -> Response:
        body = request.scope["cloven.body"]
        parse(body, self._name, self._options.max_tokens)  # what is wrong does not wait
        session = self._sessions.name(_header(request, "Authorization") or b"", _header(request, HEADER), body.get("user"))
        return await answered(request, self._answer(request.url.path, body, session))

    async def _answer(self, path: str, body: dict[str, Any], session: bytes | None) -> Response:
        replica = await self.fleet.turn(session)
        taken = contextlib.AsyncExitStack()
        taken.callback(self.fleet.give_back, replica)
        try:
            asked = replica.client.build_request("POST", path, json=body)
            answer = await replica.unless_lost(replica.client.send(asked, stream=True))
            taken.push_async_callback(answer.aclose)
            if answer.status_code == 200 and answer.headers.get("content-type", "").startswith(_EVENTS):
                return _Piped(self._pieces(replica, answer), taken)
            content = await replica.unless_lost(answer.aread())
        except BaseException:
            await taken.aclose()
            raise
        await taken.aclose()
        if answer.status_code >= 500 and _code_of(content) in _FAILED:  # noticed before the next request, not with the next look
            await self.fleet.failed(replica)
        kept = {name: answer.headers[name] for name in ("retry-after",) if name in answer.headers}
        return Response(content, answer.status_code, kept, answer.headers.get("content-type"))

    async def _pieces(self, replica: Replica, answer: httpx.Response) -> AsyncIterator[bytes]:
        """The events; where the replica is lost on the way, the last one is an error."""
        pieces = answer.aiter_bytes()
        end = b"\n\n"
        try:
            while (piece := await replica.unless_lost(_next(pieces))) is not None:
                end = (end + piece)[-2:]
                yield piece
        except ApiError as error:
            yield (b"" if end == b"\n\n" else b"\n\n") + f"data: {json.dumps(error.body())}\n\n".encode()

    async def _health(self, _request: Request) -> Response:
        state, live = self.fleet.state, [replica for replica in self.fleet.live if replica.answers]
        told = {"status": "ok" if state == READY else state, "replicas": self.fleet.wanted, "live": len(live)}
        return JSONResponse(told, 200 if state == READY else 503)


class _Piped(StreamingResponse):
    """A replica's events, fetched as they come, however slowly the client reads: the turn lasts as long as the computation, no longer.

    Whatever becomes of them, it is given back. What a client has not read is at most one answer.
    """

    def __init__(self, pieces: AsyncIterator[bytes], taken: contextlib.AsyncExitStack) -> None:
        super().__init__(self._read(), media_type=_EVENTS, headers={"cache-control": "no-cache"})
        self._pieces, self._taken = pieces, taken
        self._fetched: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `StreamingResponse`."""
        fetching = asyncio.create_task(self._fetch())
        try:
            await super().__call__(scope, receive, send)
        finally:
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)
            await self._taken.aclose()  # nothing is left to do, unless the task had not begun

    async def _fetch(self) -> None:
        try:
            async for piece in self._pieces:
                self._fetched.put_nowait(piece)
        finally:
            await self._taken.aclose()
            self._fetched.put_nowait(None)

    async def _read(self) -> AsyncIterator[bytes]:
        while (piece := await self._fetched.get()) is not None:
            yield piece


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    return await anext(pieces, None)


def _code_of(content: bytes) -> object:
    """Of an error in OpenAI's form."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return json.loads(content)["error"]["code"]
    return None


def _header(request: Request, name: str) -> bytes | None:
    value = request.headers.get(name)
    return value.encode("latin-1") if value is not None else None
