"""Requests computed together: transformers' continuous batching over the protected model.

The rows of all requests pass the model in one, so that they share every exchange with the other half: sixteen requests need hardly more
exchanges than one. A long prompt is cut into pieces, and others go on between them.

transformers' loop ends at the first error, and every request in it fails with that. The next request starts another loop. Prefixes are not
shared between requests: how fast a prompt is read would tell who else has sent its beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from cloven.errors import RunError
from cloven.serving.api_error import ApiError, peer_away, stopping
from cloven.serving.model import ServedModel
from cloven.serving.sampling import KWARG, Sampler, processors
from cloven.serving.text import Text
from cloven.telemetry import logger

PAGE_TOKENS = 16
_START_SECONDS, _STOP_SECONDS, _LOOK_SECONDS = 60.0, 2.0, 0.5
_NO_TOKEN = -1  # as the end of a sequence: never comes


class _Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """transformers' loop, in a thread that does not keep the process, and which tells the error that ended it."""

    def __init__(self, served: ServedModel, requests: int, rows: int, cached: int) -> None:
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-cached // PAGE_TOKENS),
            max_batch_tokens=rows,
            max_requests_per_batch=requests,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=_NO_TOKEN, pad_token_id=0, use_cache=False)
        super().__init__(served.model, greedy, config)
        self.logit_processor = processors()
        self._served = served
        self.error: Exception | None = None

    def start(self) -> None:
        """See `ContinuousBatchingManager.start`."""
        self.background_thread_status.clear()
        self._generation_thread = threading.Thread(
            target=self._run_generation_loop, kwargs={"use_inference_mode": False}, name="cloven-batch", daemon=True
        )
        self._generation_thread.start()

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        self.error = error
        self._served.noticed(error)  # before the requests hear of it
        super()._handle_critical_error(error, batch_processor)

    def wait_until_ready(self) -> None:
        """Wait for the cache.

        Raises:
            RunError: this model cannot be batched.
        """
        until = time.monotonic() + _START_SECONDS
        while self.batch_processor is None and self.is_running() and time.monotonic() < until:
            time.sleep(0.005)
        if self.batch_processor is None:
            raise RunError(f"continuous batching does not start: {type(self.error).__name__ if self.error else 'no answer'}")


class _Request:
    """A request in the batch; in the event loop's thread."""

    def __init__(self, name: str, text: Text, fixed: bool, first: Callable[[], None], ended: Callable[[Exception | None], None]) -> None:
        self.name, self.text, self.first, self.ended = name, text, first, ended
        self._fixed, self._seen = fixed, 0

    def take(self, output: Any) -> bool:
        """New tokens; whether the text is complete, and nothing more is wanted."""
        tokens = output.generated_tokens
        new, self._seen = tokens[self._seen :], max(self._seen, len(tokens))
        for token in new:
            self.first()
            self.text.push(token)
        return self.text.over and not self._fixed


class Batch:
    """The requests that are computed together.

    Args:
        served: the model.
        requests: at once.
        rows: of all requests in one pass.
        cached: tokens of all requests in the cache.

    Raises:
        RunError: this model cannot be batched.
    """

    def __init__(self, served: ServedModel, requests: int, rows: int, cached: int) -> None:
        self._served, self._sizes = served, (requests, rows, cached)
        self.cached = cached
        self._requests: dict[str, _Request] = {}
        self._looking: asyncio.Task[None] | None = None
        self._stopped = False
        self._manager = self._new()
        self._manager.wait_until_ready()

    def _new(self) -> _Manager:
        try:
            manager = _Manager(self._served, *self._sizes)
        except (ValueError, AttributeError, TypeError) as error:
            raise RunError(f"this model cannot be batched: {type(error).__name__}") from error
        manager.start()
        return manager

    def add(
        self,
        name: str,
        prompt: list[int],
        text: Text,
        *,
        tokens: int,
        ends: list[int],
        sampler: Sampler | None,
        fixed: bool,
        first: Callable[[], None],
        ended: Callable[[Exception | None], None],
    ) -> None:
        """Compute one more request; in the event loop's thread.

        Args:
            name: of the request, unique.
            prompt: token ids.
            text: gets the tokens.
            tokens: how many, at most.
            ends: tokens that end it.
            sampler: None: greedy.
            fixed: compute all `tokens` whatever the text is.
            first: called with every token; ended: once, with the error, if one ended it.
        """
        if self._stopped:
            raise stopping()
        self._served.require_ready()
        if self._manager.error is not None or not self._manager.is_running():  # or still in its last words
            self._fail_all()
            self._manager.batch_processor = None  # its cache
            gc.collect()
            self._manager = self._new()
        request = self._requests[name] = _Request(name, text, fixed, first, ended)
        self._manager.register_result_handler(name, lambda output: self._heard(request, output))
        wishes = {} if sampler is None else {KWARG: sampler}
        added = self._manager.add_request(
            prompt, request_id=name, max_new_tokens=tokens, streaming=True, eos_token_id=_NO_TOKEN if fixed else ends or _NO_TOKEN, **wishes
        )
        if added is None:
            self._finish(request, self._why())
        elif self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    def cancel(self, name: str) -> None:
        """Nobody wants this one any longer."""
        request = self._requests.get(name)
        if request is not None:
            self._manager.cancel_request(name)
            self._finish(request, None)

    def stop(self) -> None:
        """End the loop, and every request with it; in the event loop's thread."""
        self._stopped = True
        for request in list(self._requests.values()):
            self._manager.cancel_request(request.name)
            self._finish(request, stopping())
        if self._looking is not None:
            self._looking.cancel()

    def join(self) -> bool:
        """Wait for the loop's thread; whether it has ended in time."""
        with contextlib.suppress(RuntimeError):
            self._manager.stop(block=True, timeout=_STOP_SECONDS, hard_stop=True)
        return not self._manager.is_running()

    def _heard(self, request: _Request, output: Any) -> None:
        if request.name not in self._requests:
            return
        try:
            over = request.take(output)
        except Exception as error:
            self._manager.cancel_request(request.name)
            self._finish(request, error)
            return
        if output.error is not None:
            self._finish(request, self._why())
        elif output.is_finished():
            self._finish(request, None)
        elif over:
            self._manager.cancel_request(request.name)
            self._finish(request, None)

    def _finish(self, request: _Request, error: Exception | None) -> None:
        if self._requests.pop(request.name, None) is None:
            return
        router = self._manager.output_router
        with router._lock:  # of a cancelled request, transformers would keep it
            router.result_handlers.pop(request.name, None)
        request.ended(error)

    def _why(self) -> Exception:
        """The error that ended the loop."""
        if self._stopped:
            return stopping()
        return self._manager.error or ApiError(500, "this request failed in the server", "internal_error", "server_error")

    async def _look(self) -> None:
        """A request that came while the loop was ending would wait for ever."""
        while self._requests:
            await asyncio.sleep(_LOOK_SECONDS)
            if not self._manager.is_running():
                self._fail_all()

    def _fail_all(self) -> None:
        lost = list(self._requests.values())
        if lost:
            logger.info("%d requests had come too late for a loop that was ending", len(lost))
        for request in lost:
            self._finish(request, self._manager.error or peer_away())
