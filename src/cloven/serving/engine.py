"""The thread in which the model computes: one piece of work after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from cloven.telemetry import logger

Work = Callable[[], None]


class Engine:
    """A thread that does what it is given, in order; work must not raise."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="cloven-model", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Do this after everything that was given before."""
        self._queue.put(work)

    def stop(self, seconds: float) -> bool:
        """End after the work in hand; whether that was within so many seconds."""
        self._queue.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception as error:
                logger.error("a request's work failed: %s", type(error).__name__)
            del work  # or its tensors would live until the next request
