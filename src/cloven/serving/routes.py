"""What every application of the endpoint has: its gate in front, the model's card, answers that end in a response whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cloven.local_host import LOCAL_HOSTS
from cloven.serving.api_error import ApiError, log_failure, of_exception
from cloven.serving.api_keys import ApiKeys
from cloven.serving.gate import Gate, refusal
from cloven.serving.options import ServeOptions


def behind_gate(
    app: ASGIApp,
    keys: ApiKeys | None,
    options: ServeOptions,
    more_open: frozenset[str] = frozenset(),
    answered: Callable[[int], None] = lambda status: None,
) -> ASGIApp:
    """The application, asked only by those who may; `more_open` and `answered` as of `Gate`."""
    hosts = frozenset(LOCAL_HOSTS) if options.local else None
    return Gate(app, keys, hosts, options.max_body, more_open, answered)


async def answered(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes, the refusal that its error stands for, or nothing, because the client has hung up: it ends then.

    Raises:
        ApiError, HTTPException: of `work`, for `REFUSALS`.
    """
    answer, left = asyncio.create_task(work), asyncio.create_task(_until_left(request))
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=499)  # which nobody reads
    except (ApiError, HTTPException):
        raise
    except Exception as error:
        log_failure(error)
        return refusal(of_exception(error))
    finally:
        for task in (answer, left):
            task.cancel()
        await asyncio.gather(answer, left, return_exceptions=True)


async def _until_left(request: Request) -> None:
    """Until the client has hung up; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def model_routes(name: str) -> list[Route]:
    """/v1/models and /v1/models/NAME: there is one model."""
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "cloven"}

    async def every(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def one(request: Request) -> Response:
        if request.path_params["name"] != name:
            raise ApiError(404, f"there is one model here, {name}", "model_not_found", param="model")
        return JSONResponse(card)

    return [Route("/v1/models", every, methods=["GET"]), Route("/v1/models/{name:path}", one, methods=["GET"])]


async def _refuse(_request: Request, error: Exception) -> Response:
    return refusal(of_exception(error))


async def _refuse_route(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return refusal(ApiError(404, "there is nothing here", "not_found"))
    if error.status_code == 405:
        return refusal(ApiError(405, "not by this method", "method_not_allowed"))
    return refusal(ApiError(error.status_code, "transformers refuses this request", "invalid_value"))


REFUSALS: Any = {ApiError: _refuse, HTTPException: _refuse_route}
