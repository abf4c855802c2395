"""What the endpoint counts: answers by their status, tokens, and whose turn it is."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

from cloven.metrics.catalog import Sample


class EndpointCounts:
    """Counts of one endpoint; written in its event loop, read by any thread.

    Args:
        waiting: how many requests wait for their turn now.

    Guarantee: numbers, never contents. Not hidden from whoever may read them: how many tokens are computed and when.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._waiting = waiting
        self._lock = threading.Lock()
        self._answers: Counter[int] = Counter()
        self._tokens = 0
        self._computed: dict[object, Callable[[], int]] = {}

    def answered(self, status: int) -> None:
        """An answer has begun."""
        with self._lock:
            self._answers[status] += 1

    def begun(self, request: object, tokens: Callable[[], int]) -> None:
        """A request is computed from now on; `tokens` says how many its answer has so far."""
        with self._lock:
            self._computed[request] = tokens

    def ended(self, request: object) -> None:
        """It is computed no longer; its tokens stay counted."""
        with self._lock:
            tokens = self._computed.pop(request, None)
            self._tokens += tokens() if tokens is not None else 0

    def samples(self) -> Iterator[Sample]:
        """See `cloven.metrics.catalog.Source`."""
        with self._lock:
            answers, running = sorted(self._answers.items()), len(self._computed)
            tokens = self._tokens + sum(read() for read in self._computed.values())
        for status, count in answers:
            yield Sample("cloven_answers_total", float(count), (str(status),))
        yield Sample("cloven_tokens_total", float(tokens))
        yield Sample("cloven_waiting_requests", float(self._waiting()))
        yield Sample("cloven_computed_requests", float(running))
