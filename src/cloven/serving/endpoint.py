"""The routes: what a client may ask for, and nothing else.

    POST /v1/chat/completions   POST /v1/completions        GET /v1/models   GET /v1/models/NAME        GET /health

transformers' own application has more (/load_model loads any directory, /reset unloads the model, for everybody): they do not exist here,
only its handlers are used.

A request: checked, then waits for its turn, then a handler makes its prompt, then the model computes. Who leaves, wherever that is, frees
what was taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from cloven.errors import RunError
from cloven.serving.api_error import ApiError, bad_request, of_exception
from cloven.serving.api_keys import ApiKeys
from cloven.serving.batching import Batch
from cloven.serving.engine import Engine
from cloven.serving.events import events
from cloven.serving.gate import refusal
from cloven.serving.generation import Generation, log_failure
from cloven.serving.handlers import ChatHandler, LoadedModel, TextHandler
from cloven.serving.model import READY, ServedModel
from cloven.serving.options import ServeOptions
from cloven.serving.order import Order, chat_order, completion_order
from cloven.serving.routes import REFUSALS, behind_gate, until_left
from cloven.serving.turns import Turns
from cloven.telemetry import logger

_STOP_SECONDS = 4.0
_Handler = Callable[[LoadedModel, Generation], ChatHandler | TextHandler]


class Endpoint:
    """A served model's application.

    Args:
        served: the model; closed when the application ends.
        options: limits.

    `running` is how many requests are computed at once.
    """

    def __init__(self, served: ServedModel, options: ServeOptions) -> None:
        self.served, self._options = served, options
        self._batch = _batch_of(served, options)
        self.running = options.max_running if self._batch is not None else 1
        self.turns = Turns(self.running, options.max_queue)
        self._engine = Engine()
        self._models = LoadedModel(served)
        self._running: set[Generation] = set()
        self._started = int(time.time())

    def application(self, keys: ApiKeys | None) -> ASGIApp:
        """The ASGI application, behind its gate."""
        for name in ("transformers", "ContinuousBatchingLogger"):  # they log requests, and errors with all they say
            logging.getLogger(name).setLevel(logging.CRITICAL)
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._list, methods=["GET"]),
            Route("/v1/models/{name:path}", self._describe, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        return behind_gate(Starlette(routes=routes, exception_handlers=REFUSALS, lifespan=self._life), keys, self._options)

    @contextlib.asynccontextmanager
    async def _life(self, _app: Any) -> AsyncIterator[None]:
        yield
        await self._stop()

    async def _stop(self) -> None:
        """Everybody who waits or is being answered gets an end; then the session is closed."""
        self.turns.stop()
        for generation in list(self._running):
            generation.cancel()
        if self._batch is not None:
            self._batch.stop()
        if await asyncio.to_thread(self._threads_end):
            self.served.close()
        else:
            logger.warning("stopping in the middle of an exchange, which did not end within %g s", _STOP_SECONDS)

    def _threads_end(self) -> bool:
        ended = self._engine.stop(_STOP_SECONDS)
        return (self._batch is None or self._batch.join()) and ended

    async def _chat(self, request: Request) -> Response:
        if not getattr(self.served.tokenizer, "chat_template", None):
            raise bad_request("this model has no chat template: use /v1/completions", "no_chat_template")
        return await self._respond(request, chat_order, ChatHandler)

    async def _complete(self, request: Request) -> Response:
        return await self._respond(request, completion_order, TextHandler)

    async def _respond(self, request: Request, parse: Callable[[Any, str, int], Order], handler: _Handler) -> Response:
        order = parse(request.scope["cloven.body"], self.served.name, self._options.max_tokens)
        self.served.require_ready()
        work, left = asyncio.create_task(self._answer(order, handler)), asyncio.create_task(until_left(request))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else Response(status_code=499)  # which nobody reads
        except (ApiError, HTTPException):
            raise
        except Exception as error:
            log_failure(error)
            return refusal(of_exception(error))
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _answer(self, order: Order, handler: _Handler) -> Response:
        await self.turns.take()
        generation: Generation | None = None

        def over() -> None:
            if generation is not None:
                self._running.discard(generation)
            self.turns.give_back()

        try:
            self.served.require_ready()  # it may have changed while this one waited
            generation = Generation(self.served, self._engine, self._batch, order, self._options, over)
            self._running.add(generation)
            response: Any = await handler(self._models, generation).handle_request(order.body, f"cloven-{uuid.uuid4().hex}")
            if isinstance(response, StreamingResponse):
                await generation.begun()  # until here an error has a status of its own
                response.body_iterator = events(response.body_iterator, generation)
            assert isinstance(response, Response)
            return response
        except TemplateError:
            raise bad_request("the model's chat template refuses these messages", "template_refused", "messages") from None
        except BaseException:
            if generation is not None:
                generation.cancel()
            raise
        finally:
            if generation is None or not generation.started:
                over()

    async def _list(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _describe(self, request: Request) -> Response:
        if request.path_params["name"] != self.served.name:
            raise ApiError(404, f"there is one model here, {self.served.name}", "model_not_found", param="model")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.served.name, "object": "model", "created": self._started, "owned_by": "cloven"}

    async def _health(self, _request: Request) -> Response:
        state = self.served.state
        return JSONResponse({"status": "ok" if state == READY else state}, 200 if state == READY else 503)


def _batch_of(served: ServedModel, options: ServeOptions) -> Batch | None:
    """Requests are computed together where that is wanted and possible."""
    if options.max_running == 1:
        return None
    if not served.batches:
        logger.info("requests are computed one after the other: keys of a cache are of one sequence (KV-Shield's session mode)")
        return None
    try:
        return Batch(served, options.max_running, options.rows, options.cache_tokens)
    except RunError as error:
        logger.warning("requests are computed one after the other: %s", error)
        return None
