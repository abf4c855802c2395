from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloven.serving.api_error import ApiError, replica_lost
from cloven.serving.api_keys import ApiKeys
from cloven.serving.options import ServeOptions
from cloven.serving.routes import REFUSALS, answered, behind_gate, model_routes
from tests.served import run

KEY = "k" * 32


async def lost(_request: Request) -> Response:
    raise replica_lost()


async def refused(_request: Request) -> Response:
    raise HTTPException(422, "with a prompt")


async def hello(_request: Request) -> Response:
    return JSONResponse("hello")


def client(keys: ApiKeys | None = None, **options: Any) -> httpx.AsyncClient:
    routes = [Route(f"/{one.__name__}", one) for one in (lost, refused, hello)]
    app: Any = behind_gate(Starlette(routes=routes, exception_handlers=REFUSALS), keys, ServeOptions(**options))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")


def test_refusals_have_one_form() -> None:
    async def test() -> None:
        async with client() as asking:
            for path, status, code in (("lost", 503, "replica_lost"), ("refused", 422, "invalid_value"), ("nothing", 404, "not_found")):
                answer = await asking.get(f"/{path}")
                assert answer.status_code == status and answer.json()["error"]["code"] == code and "prompt" not in answer.text
            assert (await asking.get("/lost")).headers["retry-after"] == "1"
            assert (await asking.delete("/hello")).json()["error"]["code"] == "method_not_allowed"

    run(test)


def test_the_gate_stands_in_front() -> None:
    async def test() -> None:
        async with client(ApiKeys([KEY])) as asking:
            assert (await asking.get("/hello")).status_code == 401
            assert (await asking.get("/hello", headers={"Authorization": f"Bearer {KEY}"})).json() == "hello"
            assert (await asking.get("/hello", headers={"Host": "elsewhere"})).status_code == 421
        async with client(host="0.0.0.0", insecure_open=True) as asking:
            assert (await asking.get("/hello", headers={"Host": "elsewhere"})).json() == "hello"

    run(test)


def asked(*messages: str) -> Request:
    """A request whose client sends these, and then nothing more."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return {"type": left.pop(0)}

    return Request({"type": "http", "headers": []}, receive)


def test_a_client_that_leaves_ends_the_work() -> None:
    async def test() -> None:
        ended = list[str]()

        async def work() -> Response:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("work")
            raise AssertionError

        assert (await answered(asked("http.request", "http.disconnect"), work())).status_code == 499
        assert ended == ["work"]

    run(test)


def test_work_ends_in_a_response(caplog: pytest.LogCaptureFixture) -> None:
    """Its own, or a refusal; an error that nobody foresaw is logged without what it says, and nobody is told more."""

    async def fine() -> Response:
        return JSONResponse("fine")

    async def wrong() -> Response:
        raise ValueError("with a prompt")

    async def test() -> None:
        assert (await answered(asked(), fine())).body == b'"fine"'
        failed = await answered(asked(), wrong())
        assert failed.status_code == 500 and b"internal_error" in failed.body and b"prompt" not in failed.body
        for work, error in ((lost, ApiError), (refused, HTTPException)):
            with pytest.raises(error):
                await answered(asked(), work(asked()))

    run(test)
    assert "ValueError at test_routes.py:" in caplog.text and "prompt" not in caplog.text


def test_there_is_one_model() -> None:
    async def test() -> None:
        app: Any = Starlette(routes=model_routes("me/bard"), exception_handlers=REFUSALS)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as asking:
            listed = (await asking.get("/v1/models")).json()
            assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == ["me/bard"]
            assert (await asking.get("/v1/models/me/bard")).json() == listed["data"][0]
            assert (await asking.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"

    run(test)
