"""Replicas without Ray and without a model, on real sockets in the test's own event loop: the front cannot tell them from others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import httpx
import uvicorn

from cloven.errors import RunError
from cloven.serving.api_keys import ApiKeys
from cloven.serving.model import READY
from cloven.serving.options import ServeOptions
from cloven.serving.replicas.fleet import Fleet
from cloven.serving.replicas.front import Front
from cloven.serving.replicas.launching import Started

NAME = "bard"
PIECES = 3


class FakeReplica:
    """Answers as its prompt says: at once with its own name, "slow" when `released`, "stream" in pieces, "half" with half a piece,
    "fail …" with an error. What it was asked stands in `asked`."""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, READY
        self.log: list[tuple[int, str]] = []
        self.samples: list[Any] = []
        self.asked: list[str] = []
        self.left = 0
        self.silent = False
        self.stopped = False
        self.released, self.begun = asyncio.Event(), asyncio.Event()
        self.ended: Future[None] = Future()
        self._server = uvicorn.Server(
            uvicorn.Config(self._app, interface="asgi3", log_config=None, lifespan="off", ws="none", access_log=False)
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self, running: int) -> Started:
        """Listen."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup(sockets=[listener])
        port = listener.getsockname()[1]
        return Started(NAME, "slip", running, f"http://127.0.0.1:{port}", None, self.ended, self)

    async def die(self, noticed: bool = True) -> None:
        """Its connections break, as when its process is killed; `noticed`: and the launcher says so."""
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        if noticed and not self.ended.done():
            self.ended.set_result(None)
        self.released.set()
        await asyncio.sleep(0)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/replica":
            if self.silent:
                await asyncio.sleep(3600)
            lines, self.log = self.log, []
            await self._json(send, {"state": self.state, "log": lines, "samples": self.samples})
            return
        data = b""
        while True:
            message = await receive()
            data += message.get("body", b"")
            if not message.get("more_body"):
                break
        prompt = json.loads(data)["prompt"]
        self.asked.append(prompt)
        self.begun.set()
        kind, _, code = prompt.partition(" ")
        if kind == "fail":
            error = {"message": "no", "type": "server_error", "param": None, "code": code}
            await self._json(send, {"error": error}, 503, [(b"retry-after", b"1")])
        elif kind in ("stream", "half"):
            await self._stream(kind, receive, send)
        else:
            if kind == "slow":
                await self._until(self.released, receive)
            await self._json(send, {"by": self.name})

    async def _until(self, event: asyncio.Event, receive: Any) -> None:
        """Or until the front hangs up."""
        waits = {asyncio.ensure_future(event.wait()), asyncio.ensure_future(receive())}
        _, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for one in rest:
            one.cancel()
        if not event.is_set():
            self.left += 1

    async def _stream(self, kind: str, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
        piece = b"data: {}\n\n" if kind == "stream" else b"data: {"
        for _ in range(PIECES if kind == "stream" else 1):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._until(self.released, receive)
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    @staticmethod
    async def _json(send: Any, value: object, status: int = 200, headers: Any = ()) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json"), *headers]})
        await send({"type": "http.response.body", "body": json.dumps(value).encode()})


class FakeLauncher:
    """Starts fakes; `refusals` is how many starts fail."""

    def __init__(self, running: int = 2) -> None:
        self._loop, self._running = asyncio.get_running_loop(), running
        self.replicas: list[FakeReplica] = []
        self.refusals, self.tries = 0, 0
        self.front: Front | None = None

    async def make(self) -> Started:
        """In the event loop."""
        self.replicas.append(FakeReplica(f"r{len(self.replicas) + 1}"))
        return await self.replicas[-1].start(self._running)

    def start(self) -> Started:
        """See `Launcher`."""
        self.tries += 1
        if self.refusals:
            self.refusals -= 1
            raise RunError("no room")
        return asyncio.run_coroutine_threadsafe(self.make(), self._loop).result(10)

    def stop(self, started: Started) -> None:
        """See `Launcher`."""
        started.handle.stopped = True
        asyncio.run_coroutine_threadsafe(started.handle.die(), self._loop).result(10)


@contextlib.asynccontextmanager
async def front(
    replicas: int = 2, running: int = 2, keys: ApiKeys | None = None, **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Fleet, FakeLauncher]]:
    """A client of the front, without a socket of its own."""
    launcher = FakeLauncher(running)
    serving = ServeOptions(**options)
    fleet = Fleet(launcher, [await launcher.make() for _ in range(replicas)], serving.max_queue)
    made = launcher.front = Front(NAME, fleet, serving)
    app: Any = made.application(keys)
    transport = httpx.ASGITransport(app=app)
    async with made._life(None), httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
        await until(lambda: len(fleet.live) == replicas)
        yield client, fleet, launcher


async def ask(client: httpx.AsyncClient, prompt: str = "hello", headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    """A completion."""
    return await client.post("/v1/completions", json={"prompt": prompt, **more}, headers=headers)


async def by(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **more: Any) -> str:
    """Which replica answers."""
    answer = await ask(client, headers=headers, **more)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["by"])


async def until(true: Any, seconds: float = 10) -> None:
    """Wait for it."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)
