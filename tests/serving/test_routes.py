from __future__ import annotations

from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloven.serving.api_error import replica_lost
from cloven.serving.api_keys import ApiKeys
from cloven.serving.options import ServeOptions
from cloven.serving.routes import REFUSALS, behind_gate, until_left
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


def test_a_client_that_leaves() -> None:
    async def test() -> None:
        messages = [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        await until_left(Request({"type": "http", "headers": []}, receive))
        assert not messages

    run(test)
