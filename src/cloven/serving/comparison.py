"""One prompt through the protected model and through the original, greedily, one after the other, in the engine's thread.

A comparison is a request like any other: it waits for its turn, its prompt is made by transformers' handlers, and who leaves ends it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from cloven.serving.api_error import bad_request, stopping
from cloven.serving.engine import Engine
from cloven.serving.generation import Generation, end_tokens
from cloven.serving.handlers import ChatHandler, TextHandler
from cloven.serving.model import ServedModel
from cloven.serving.options import ServeOptions
from cloven.serving.order import Order
from cloven.serving.original import Original
from cloven.serving.text import Text, TextEnded

_FIELDS = frozenset(("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "chat_template_kwargs"))


@dataclass(frozen=True)
class Run:
    """What one model did: tokens, seconds to the first and from the first to the last."""

    tokens: list[int]
    seconds_first: float
    seconds_rest: float

    def rate(self) -> float | None:
        """Tokens per second after the first one; None: there is no second one."""
        return (len(self.tokens) - 1) / self.seconds_rest if len(self.tokens) > 1 else None


class _Timed:
    """A streamer that reads the clock, and ends when the comparison is not wanted any longer."""

    def __init__(self, text: Text, heard: Callable[[], None]) -> None:
        self._text, self._heard = text, heard
        self.times: list[float] = [time.monotonic()]  # the beginning, the prompt, every token

    def put(self, value: Any) -> None:
        """See `Text.put`."""
        self._heard()
        self._text.put(value)
        self.times.append(time.monotonic())

    def end(self) -> None:
        """See `Text.end`."""
        self._text.end()


class Comparison(Generation):
    """See the module.

    Args:
        served, engine, order, options, on_end: see `Generation`.
        original: the unprotected model.
        others: how many other requests are being computed now.
    """

    def __init__(
        self,
        served: ServedModel,
        engine: Engine,
        order: Order,
        options: ServeOptions,
        on_end: Callable[[], None],
        original: Original,
        others: Callable[[], int],
    ) -> None:
        super().__init__(served, engine, None, order, options, on_end)
        self._original, self._others, self._most_others = original, others, 0
        self._second: Text | None = None
        self._runs: list[Run] = []

    def _start(self, tokenizer: Any, inputs: Any, config: Any, pieces: Any, parser: Any) -> Text:
        config.do_sample = False
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50  # unused: transformers would warn
        self._second = Text(tokenizer, self._loop, None, ends=end_tokens(config.eos_token_id), fixed_length=self._fixed)
        return super()._start(tokenizer, inputs, config, pieces, parser)

    def cancel(self) -> None:
        """See `Generation`: of both texts."""
        super().cancel()
        if self._second is not None:
            self._second.cancel()

    def _generate(self, text: Text, inputs: Any, config: Any) -> None:
        assert self._second is not None
        original = self._original.model()  # before anything is timed
        self._run_one(self._served.model, text, inputs, config)
        self._run_one(original, self._second, inputs, config)
        if text.cancelled:
            raise stopping()  # what there is was not to be compared

    def _run_one(self, model: Any, text: Text, inputs: Any, config: Any) -> None:
        timed = _Timed(text, self._hear)
        with contextlib.suppress(TextEnded):
            model.generate(**inputs, generation_config=config, streamer=timed)
        first, last = timed.times[min(2, len(timed.times) - 1)], timed.times[-1]
        self._runs.append(Run(text.tokens, first - timed.times[0], last - first))

    def _hear(self) -> None:
        self._most_others = max(self._most_others, self._others())

    def result(self) -> dict[str, Any]:
        """Both texts and their rates, as JSON.

        `others`: the most other requests that were computed meanwhile: with any, both rates are lower than they would be alone.
        """
        protected, original = self._runs

        def described(run: Run) -> dict[str, Any]:
            return {
                "text": self._served.tokenizer.decode(run.tokens, skip_special_tokens=True),
                "tokens": len(run.tokens),
                "seconds_to_first": run.seconds_first,
                "tokens_per_s": run.rate(),
            }

        return {
            "protected": described(protected),
            "unprotected": described(original),
            "equal": protected.tokens == original.tokens,
            "others": self._most_others,
        }


class Compared:
    """transformers' handler makes the prompt; the answer is the comparison's."""

    def __init__(self, handler: ChatHandler | TextHandler, comparison: Any) -> None:
        self._handler, self._comparison = handler, comparison

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """See `ChatHandler`."""
        await self._handler.handle_request(body, request_id)
        return JSONResponse(self._comparison.result())


def checked_comparison(body: Any) -> Any:
    """The body of a request for a comparison, of which `order` checks the rest.

    Raises:
        ApiError: it asks for what a comparison does not do.
    """
    for field in body if isinstance(body, dict) else ():
        if field not in _FIELDS:
            raise bad_request("a comparison is greedy, whole, and takes no other settings", "unknown_parameter", str(field)[:100])
    return body
