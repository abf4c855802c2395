"""What every application of the endpoint has: its gate in front, refusals in OpenAI's form, and clients that hang up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from cloven.serving.api_error import ApiError, of_exception
from cloven.serving.api_keys import ApiKeys
from cloven.serving.gate import Gate, refusal
from cloven.serving.options import LOCAL_HOSTS, ServeOptions


def behind_gate(
    app: ASGIApp,
    keys: ApiKeys | None,
    options: ServeOptions,
    more_open: frozenset[str] = frozenset(),
    answered: Callable[[int], None] = lambda status: None,
) -> ASGIApp:
    """The application, asked only by those who may; `more_open` and `answered` as of `Gate`."""
    hosts = frozenset((*LOCAL_HOSTS, "[::1]")) if options.local else None
    return Gate(app, keys, hosts, options.max_body, more_open, answered)


async def until_left(request: Request) -> None:
    """Until the client has hung up; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
