"""Sockets that say nothing, at a real server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from cloven.serving import connections
from cloven.serving.connections import TimelyProtocol

SECONDS = 0.5
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await asyncio.sleep(3 * SECONDS if scope["path"] == "/slow" else 0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server with room for eight connections."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", SECONDS)
    config = uvicorn.Config(
        application, http=TimelyProtocol, loop="asyncio", lifespan="off", log_config=None, limit_concurrency=8, timeout_keep_alive=30
    )
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def hung_up(one: socket.socket) -> bool:
    try:
        return one.recv(1000) == b""
    except ConnectionError:
        return True


def answered(one: socket.socket) -> bool:
    one.sendall(REQUEST)
    got = b""
    while not got.endswith(b"ok"):
        more = one.recv(1000)
        if not more:
            return False
        got += more
    return True


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: x"])
def test_who_says_nothing_is_hung_up_on(port: int, said: bytes) -> None:
    with connected(port) as one:
        one.sendall(said)
        started = time.monotonic()
        assert hung_up(one)
        assert SECONDS * 0.5 < time.monotonic() - started < 5


def test_a_head_in_drips_takes_no_longer(port: int) -> None:
    started = time.monotonic()
    with connected(port) as one:
        with pytest.raises(OSError):  # reset, or hung up
            while time.monotonic() - started < 5:
                one.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - started < 5


def test_a_second_request_has_its_own_time(port: int) -> None:
    with connected(port) as one:
        for _ in range(3):
            assert answered(one)
            time.sleep(SECONDS * 0.7)
        time.sleep(SECONDS)  # without a word it may stay: that is uvicorn's own time
        assert answered(one)
        one.sendall(REQUEST[:10])
        assert hung_up(one)


def test_who_asks_takes_the_place_of_who_does_not(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 60)
    silent = [connected(port) for _ in range(40)]
    time.sleep(0.2)
    try:
        for _ in range(5):
            assert httpx.get(f"http://127.0.0.1:{port}/", timeout=5, trust_env=False).status_code == 200
    finally:
        for one in silent:
            one.close()


def test_who_is_being_answered_keeps_his_place(port: int) -> None:
    """However many others come meanwhile."""
    with connected(port) as one, contextlib.ExitStack() as silent:
        one.sendall(REQUEST.replace(b"/", b"/slow", 1))
        time.sleep(0.1)
        for _ in range(40):
            silent.enter_context(connected(port))
        got = b""
        while not got.endswith(b"ok") and (more := one.recv(1000)):
            got += more
        assert got.startswith(b"HTTP/1.1 200") and got.endswith(b"ok")
