from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cloven.serving import gate as gate_module
from cloven.serving.api_keys import ApiKeys
from cloven.serving.gate import Gate

KEY = "one-0123456789abcdefghij"
LOCAL = frozenset(("localhost", "127.0.0.1", "::1", "[::1]"))


class Asked:
    """An application that keeps what it gets, and a client that is no more than its messages."""

    def __init__(self, keys: ApiKeys | None = None, hosts: frozenset[str] | None = LOCAL, most: int = 100) -> None:
        self.scopes: list[Any] = []
        self.gate = Gate(self.app, keys, hosts, most)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

    def ask(self, method: str = "POST", path: str = "/v1/completions", chunks: Any = (b"{}",), **headers: str) -> tuple[int, Any]:
        """Status and parsed body; 0 where there was no answer."""
        fields = {
            "host": "localhost:8000",
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        pending = list(chunks)
        sent: list[Any] = []

        async def receive() -> Any:
            if not pending:
                return {"type": "http.disconnect"}
            part = pending.pop(0)
            if part is None:
                await asyncio.sleep(10)
            return {"type": "http.request", "body": part, "more_body": bool(pending)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
        asyncio.run(self.gate(scope, receive, send))
        if not sent:
            return 0, None
        return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_request_passes_with_its_body_parsed() -> None:
    asked = Asked()
    assert asked.ask(chunks=(b'{"a"', b": 1}")) == (200, {})
    assert asked.scopes[0]["cloven.body"] == {"a": 1}
    assert asked.ask("GET", "/health", ()) == (200, {})


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:99", "[::1]:8000", "LOCALHOST:1"])
def test_this_machine_by_its_names(host: str) -> None:
    assert Asked().ask(host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "localhost@evil"])
def test_no_other_name(host: str) -> None:
    asked = Asked()
    assert asked.ask(host=host)[0] == 421 and not asked.scopes
    assert Asked(hosts=None).ask(host=host)[0] == 200  # on the network, names are the operator's


def test_keys() -> None:
    asked = Asked(ApiKeys([KEY]))
    assert asked.ask()[0] == asked.ask("GET", "/v1/models")[0] == asked.ask("GET", "/health/", ())[0] == 401
    assert asked.ask("GET", "/nothing", ())[0] == 401
    assert not asked.scopes
    assert asked.ask("GET", "/health", ())[0] == asked.ask(authorization=f"Bearer {KEY}")[0] == 200


def test_more_that_needs_no_key() -> None:
    asked = Asked(ApiKeys([KEY]))
    asked.gate = Gate(asked.app, ApiKeys([KEY]), LOCAL, 100, frozenset(("/", "/page.js")))
    assert [asked.ask("GET", path, ())[0] for path in ("/", "/page.js", "/health")] == [200, 200, 200]
    assert [asked.ask("GET", path, ())[0] for path in ("/live", "//", "/page.js/", "/v1/models", "")] == [401] * 5
    assert asked.ask("GET", "/", (), host="evil.example")[0] == 421


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_foreign_web_page_could_send(kind: str) -> None:
    asked = Asked()
    assert asked.ask(content_type=kind)[0] == 415 and not asked.scopes


def test_json_by_its_longer_name() -> None:
    assert Asked().ask(content_type="Application/JSON; charset=utf-8")[0] == 200


@pytest.mark.parametrize("chunks", [(b" " * 101,), (b" " * 60, b" " * 60), (b'{"a": "' + b"x" * 200 + b'"}',)])
def test_too_large(chunks: tuple[bytes, ...]) -> None:
    asked = Asked()
    assert asked.ask(chunks=chunks)[0] == 413 and not asked.scopes


def test_too_large_by_its_own_word() -> None:
    for length in ("101", "9" * 40):
        assert Asked().ask(content_length=length)[0] == 413
    for length in ("x", "-1", "100"):
        assert Asked().ask(content_length=length)[0] == 200  # what counts is what comes


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"nul", b"[" * 90])
def test_no_json(body: bytes) -> None:
    status, answer = Asked().ask(chunks=(body,))
    assert status == 400 and answer["error"]["code"] == "invalid_json"


def test_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "_BODY_SECONDS", 0.05)
    assert Asked().ask(chunks=(b"{", None, b"}"))[0] == 408


def test_who_hangs_up_gets_nothing() -> None:
    asked = Asked()
    assert asked.ask(chunks=())[0] == 0 and not asked.scopes


def test_websockets_are_not_answered_and_the_lifespan_is() -> None:
    asked = Asked()

    async def nothing(*_: Any) -> Any:
        raise AssertionError("nobody is asked")

    asyncio.run(asked.gate({"type": "websocket"}, nothing, nothing))
    assert not asked.scopes
    asyncio.run(asked.gate({"type": "lifespan"}, nothing, nothing))
    assert [scope["type"] for scope in asked.scopes] == ["lifespan"]
