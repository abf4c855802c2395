"""The routes: what a client may ask for, and nothing else.

    POST /v1/chat/completions   POST /v1/completions        GET /v1/models   GET /v1/models/NAME        GET /health
    with a page: GET / and its files   GET /live   POST /compare

transformers' own application has more (/load_model loads any directory, /reset unloads the model, for everybody): they do not exist here,
only its handlers are used.

A request: checked, then waits for its turn, then a handler makes its prompt, then the model computes. Who leaves, wherever that is, frees
what was taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from cloven.errors import RunError
from cloven.metrics.catalog import Sample
from cloven.serving.api_error import ApiError, bad_request, stopping
from cloven.serving.api_keys import ApiKeys
from cloven.serving.batching import Batch
from cloven.serving.comparison import Compared, Comparison, checked_comparison
from cloven.serving.counts import EndpointCounts
from cloven.serving.engine import Engine
from cloven.serving.events import events
from cloven.serving.generation import Generation, context_of
from cloven.serving.handlers import ChatHandler, LoadedModel, TextHandler
from cloven.serving.live import Live
from cloven.serving.model import READY, ServedModel
from cloven.serving.options import ServeOptions
from cloven.serving.order import Order, chat_order, completion_order
from cloven.serving.original import Original
from cloven.serving.page_files import PATHS, page_routes
from cloven.serving.prompt_length import require_fitting
from cloven.serving.routes import REFUSALS, answered, behind_gate, model_routes
from cloven.serving.turns import Turns
from cloven.telemetry import logger

_STOP_SECONDS = 4.0
_Handler = Callable[[LoadedModel, Any], ChatHandler | TextHandler | Compared]
_Made = Callable[[Order, Callable[[], None]], Generation]


class Endpoint:
    """A served model's application.

    Args:
        served: the model; closed when the application ends.
        options: limits.

    `running` is how many requests are computed at once.
    """

    def __init__(self, served: ServedModel, options: ServeOptions) -> None:
        self.served, self._options = served, options
        self._original = Original(options.compare, served) if options.compare is not None else None
        self._batch = _batch_of(served, options)
        self.running = options.max_running if self._batch is not None else 1
        self.turns = Turns(self.running, options.max_queue)
        self.counts = EndpointCounts(lambda: self.turns.waiting)
        self._engine = Engine()
        self._models = LoadedModel(served)
        self._running: set[Generation] = set()
        self._live = Live(served, lambda: self._running, lambda: self.turns.waiting)

    def application(self, keys: ApiKeys | None) -> ASGIApp:
        """The ASGI application, behind its gate."""
        for name in ("transformers", "ContinuousBatchingLogger"):  # they log requests, and errors with all they say
            logging.getLogger(name).setLevel(logging.CRITICAL)
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            *model_routes(self.served.name),
            Route("/health", self._health, methods=["GET"]),
        ]
        if self._options.with_page:
            routes += [*page_routes(), Route("/live", self._look, methods=["GET"]), Route("/compare", self._compare, methods=["POST"])]
        open_paths = PATHS if self._options.with_page else frozenset[str]()
        app = Starlette(routes=routes, exception_handlers=REFUSALS, lifespan=self._life)
        return behind_gate(app, keys, self._options, open_paths, self.counts.answered)

    def samples(self) -> Iterator[Sample]:
        """Numbers for Prometheus: see `cloven.metrics.catalog.Source`."""
        yield from self.counts.samples()
        yield from self.served.sessions.samples()

    @contextlib.asynccontextmanager
    async def _life(self, _app: Any) -> AsyncIterator[None]:
        yield
        await self._stop()

    def refuse(self) -> None:
        """See `server.Application`."""
        self.turns.stop()

    def end_answers(self) -> None:
        """See `server.Application`."""
        for generation in list(self._running):
            generation.end_with(stopping())

    async def _stop(self) -> None:
        """Everybody who waits or is being answered gets an end; then the session is closed."""
        self.refuse()
        self.end_answers()
        if self._batch is not None:
            self._batch.stop()
        if await asyncio.to_thread(self._threads_end):
            self.served.close()
        else:
            logger.warning("stopping in the middle of an exchange, which did not end within %g s", _STOP_SECONDS)

    def _threads_end(self) -> bool:
        ended = self._engine.stop(_STOP_SECONDS)
        return (self._batch is None or self._batch.join()) and ended

    @property
    def _chats(self) -> bool:
        return bool(getattr(self.served.tokenizer, "chat_template", None))

    async def _chat(self, request: Request) -> Response:
        if not self._chats:
            raise bad_request("this model has no chat template: use /v1/completions", "no_chat_template")
        return await self._respond(request, chat_order, ChatHandler)

    async def _complete(self, request: Request) -> Response:
        return await self._respond(request, completion_order, TextHandler)

    async def _compare(self, request: Request) -> Response:
        original, body = self._original, checked_comparison(request.scope["cloven.body"])
        if original is None:
            raise ApiError(404, "there is nothing to compare with: start `cloven serve` with --compare MODEL_DIR", "no_original")
        chat = self._chats and isinstance(body, dict) and "messages" in body
        kind: Any = ChatHandler if chat else TextHandler

        def made(order: Order, over: Callable[[], None]) -> Generation:
            return Comparison(self.served, self._engine, order, self._options, over, original, lambda: len(self._running) - 1)

        parse = chat_order if chat else completion_order
        return await self._respond(request, parse, lambda models, comparison: Compared(kind(models, comparison), comparison), made)

    def _generation(self, order: Order, over: Callable[[], None]) -> Generation:
        return Generation(self.served, self._engine, self._batch, order, self._options, over)

    async def _respond(
        self, request: Request, parse: Callable[[Any, str, int], Order], handler: _Handler, made: _Made | None = None
    ) -> Response:
        order = parse(request.scope["cloven.body"], self.served.name, self._options.max_tokens)
        self.served.require_ready()
        return await answered(request, self._answer(order, handler, made or self._generation))

    async def _answer(self, order: Order, handler: _Handler, made: _Made) -> Response:
        await self.turns.take()
        generation: Generation | None = None

        def over() -> None:
            if generation is not None:
                self._running.discard(generation)
                self.counts.ended(generation)
                self._live.ended(generation)
            self.turns.give_back()

        try:
            self.served.require_ready()  # it may have changed while this one waited
            await require_fitting(self.served.tokenizer, order.body, context_of(self.served.model))
            generation = made(order, over)
            self._running.add(generation)
            self.counts.begun(generation, generation.length)
            response: Any = await handler(self._models, generation).handle_request(order.body, f"cloven-{uuid.uuid4().hex}")
            if isinstance(response, StreamingResponse):
                await generation.begun()  # until here an error has a status of its own
                response.body_iterator = events(response.body_iterator, generation, order.usage)
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

    async def _look(self, _request: Request) -> Response:
        about = {
            "model": self.served.name,
            "chat": self._chats,
            "compare": self._original is not None,
            "max_tokens": self._options.max_tokens,
        }
        headers = {"cache-control": "no-store", "cross-origin-resource-policy": "same-origin"}
        return JSONResponse({**about, **self._live.look()}, headers=headers)

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
