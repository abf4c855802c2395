"""One request's generation: what transformers' handlers take for a manager of generations.

A handler turns a request into token ids and a generation config, asks its manager for the text, and turns that into an answer. This manager
belongs to one request: it checks the length, sets the seed, and computes in the engine's thread while that is this request's turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, _StreamError

from cloven.serving.api_error import ApiError, stopping
from cloven.serving.batching import Batch
from cloven.serving.engine import Engine
from cloven.serving.model import ServedModel
from cloven.serving.options import ServeOptions
from cloven.serving.order import Order
from cloven.serving.sampling import alone_for, sampler_of
from cloven.serving.stop_strings import cut
from cloven.serving.text import Text, TextEnded
from cloven.telemetry import logger

FAILED = "failed"  # what a handler writes into the stream; `events` puts the error in its place
_NO_TOKEN = 2**31 - 1  # of no vocabulary


class Generation(BaseGenerateManager):  # type: ignore[misc]
    """The generation of one request, which has its turn.

    Args:
        served: the model.
        engine: the thread in which a request is computed by itself.
        batch: where it is computed with others, or None.
        order: what was asked for.
        options: of the endpoint: whether the length is fixed, and the rows of a pass.
        on_end: called in the event loop when the turn is over; never before the computation is.
    """

    def __init__(
        self,
        served: ServedModel,
        engine: Engine,
        batch: Batch | None,
        order: Order,
        options: ServeOptions,
        on_end: Callable[[], None],
    ) -> None:
        self._served, self._engine, self._batch = served, engine, batch
        self.order, self._options, self._on_end = order, options, on_end
        self._fixed = options.fixed_length
        self._name = f"{id(self):x}-{secrets.token_hex(8)}"
        self._batched = False
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = self._loop.create_future()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._text: Text | None = None
        self._pieces: asyncio.Queue[Any] | None = None
        self.failure: Exception | None = None
        self._refused: ApiError | None = None
        self._first_at = self._over_at = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens of the text per second, after the first one; None: there is no second one yet."""
        if self._text is None or len(self._text.tokens) < 2 or not self._first_at:
            return None
        return (len(self._text.tokens) - 1) / ((self._over_at or time.monotonic()) - self._first_at)

    @property
    def started(self) -> bool:
        """Whether the engine has it, which then calls `on_end`."""
        return self._text is not None

    def length(self) -> int:
        """Tokens of the answer so far; from any thread."""
        return len(self._text.tokens) if self._text is not None else 0

    async def begun(self) -> None:
        """Wait for the first token.

        Raises:
            Exception: what ended the generation before it.
        """
        await self._begun
        if self.failure is not None:
            raise self.failure

    def end_with(self, error: ApiError) -> None:
        """End it with an error, at the next token."""
        self._refused = error
        self.cancel()

    def cancel(self) -> None:
        """Nobody wants the text any longer: end at the next token."""
        if self._text is not None:
            self._text.cancel()
        if self._batch is not None and self._batched:
            self._batch.cancel(self._name)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], Text]:
        """See `BaseGenerateManager`."""
        del model, request_id
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        return pieces, self._start(processor, inputs, gen_config, pieces, response_parser)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """See `BaseGenerateManager`."""
        del model, request_id
        text = self._start(processor, inputs, gen_config, None, None)
        try:
            await asyncio.shield(self._done)  # whoever is cancelled, the turn lasts as long as the computation
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self.failure is not None:
            raise self.failure
        written, _ = cut(processor.decode(text.tokens, skip_special_tokens=True), self.order.stops)
        return written, inputs["input_ids"].shape[-1], text.tokens

    def stop(self) -> None:
        """See `BaseGenerateManager`."""
        self.cancel()

    def _start(self, tokenizer: Any, inputs: Any, config: Any, pieces: asyncio.Queue[Any] | None, parser: Any) -> Text:
        if self._refused is not None:
            raise self._refused  # meanwhile its prompt was made
        length = inputs["input_ids"].shape[-1]
        config.max_new_tokens = self.order.tokens(length, context_of(self._served.model))
        ends = end_tokens(config.eos_token_id)
        if self._fixed:
            config.eos_token_id = _NO_TOKEN  # for None, generate would take the model's
        text = Text(tokenizer, self._loop, pieces, ends=ends, stops=self.order.stops, fixed_length=self._fixed, parser=parser)
        self._text, self._pieces = text, pieces
        batch = self._batch
        alone = alone_for(config) or (["length"] if batch is not None and length + config.max_new_tokens > batch.cached else [])
        if batch is None or alone:
            if batch is not None:
                logger.info("a request is computed alone, for its %s", ", ".join(alone))
            config.prefill_chunk_size = self._options.constant_rows or None  # a piece of the prompt is a pass like any other
            self._engine.submit(lambda: self._run(text, inputs, config))
            return text
        self._batched = True
        prompt, tokens = inputs["input_ids"][0].tolist(), config.max_new_tokens
        sampler = sampler_of(config, self.order.seed)
        try:
            batch.add(
                self._name, prompt, text, tokens=tokens, ends=ends, sampler=sampler, fixed=self._fixed, first=self._token, ended=self._ended
            )
        except BaseException:
            self._text = None  # nothing was started
            raise
        return text

    def _run(self, text: Text, inputs: Any, config: Any) -> None:
        """In the engine's thread."""
        error: Exception | None = None
        try:
            self._served.guarded(lambda: self._generate(text, inputs, config))
        except Exception as failure:
            error = failure
        finally:
            self._in_loop(lambda: self._ended(error))

    def _generate(self, text: Text, inputs: Any, config: Any) -> None:
        if text.cancelled:
            raise stopping()
        seed = self.order.seed
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)  # of this process: nobody gets what another one's seed left
        with contextlib.suppress(TextEnded):
            self._served.model.generate(**inputs, generation_config=config, streamer=_Beginning(text, self._first))

    def _first(self) -> None:
        self._in_loop(self._token)

    def _token(self) -> None:
        self._first_at = self._first_at or time.monotonic()
        if not self._begun.done():
            self._begun.set_result(None)

    def _ended(self, error: Exception | None) -> None:
        """In the event loop, once: the computation is over."""
        assert self._text is not None
        self._over_at, error = time.monotonic(), error or self._refused
        try:
            if error is None:
                self._text.end()
        except Exception as failure:  # of the text; whatever it is, the turn is given back
            error = failure
        self.failure = error
        if error is not None and self._pieces is not None:
            self._pieces.put_nowait(_StreamError(FAILED))
        for future in (self._begun, self._done):
            if not future.done():
                future.set_result(None)
        self._on_end()

    def _in_loop(self, action: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waits
            self._loop.call_soon_threadsafe(action)


class _Beginning:
    """A streamer that says when the first token is there."""

    def __init__(self, text: Text, first: Callable[[], None]) -> None:
        self._text, self._first, self._calls = text, first, 0

    def put(self, value: Any) -> None:
        """See `Text.put`: the prompt, then the tokens."""
        self._calls += 1
        if self._calls == 2:
            self._first()
        self._text.put(value)

    def end(self) -> None:
        """See `Text.end`."""
        self._text.end()


class OneGeneration(GenerationState):  # type: ignore[misc]
    """What a handler takes for the state of all generations: it knows one."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generation:
        """See `GenerationState`."""
        del model_id, use_cb
        return self._generation

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        """See `GenerationState`: the handler prepares tensors, whoever computes."""
        del model, modality
        return False


def context_of(model: Any) -> int | None:
    """Tokens that the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def end_tokens(ids: Any) -> list[int]:
    """Of a generation config: none, one or several."""
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [int(ids)]
