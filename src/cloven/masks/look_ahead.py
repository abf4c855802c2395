"""A background thread that makes pads ahead of need.

Every source is kept at `rows` ready pads: when one falls to half of that, the missing ones are made in one batch. The thread sleeps
while nothing is missing. An error stops it and is reported once: a bad pad must end the session.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from cloven.errors import ClovenError, RunError
from cloven.telemetry import logger

_IDLE_SECONDS = 0.05


class Fillable(Protocol):
    """A source that can make pads in advance."""

    @property
    def ready(self) -> int:
        """Rows that can be taken at once."""

    def fill(self, rows: int) -> int:
        """Make pads until `rows` are ready; how many were made."""


class LookAhead:
    """Keeps sources filled.

    Args:
        sources: the pad sources, in the order of need.
        rows: ready pads to aim at, per source; 0 makes none in advance.
        on_error: called once, with the error that stopped the thread.
    """

    def __init__(self, sources: Sequence[Fillable], rows: int, on_error: Callable[[ClovenError], None]) -> None:
        self._sources, self._rows, self._on_error = list(sources), rows, on_error
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cloven-pads", daemon=True)
        if rows:
            self._thread.start()

    def stop(self) -> None:
        """End the thread, after the batch in the making."""
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._sources.clear()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if not self._fill_once():
                    self._stopping.wait(_IDLE_SECONDS)
        except Exception as error:
            logger.info("making pads failed: %s", type(error).__name__)  # the session's error says it to the user
            known = error if isinstance(error, ClovenError) else RunError(f"making pads failed: {type(error).__name__}")
            self._on_error(known)

    def _fill_once(self) -> bool:
        made = False
        for source in self._sources:
            if self._stopping.is_set():
                break
            if source.ready <= self._rows // 2:
                made = source.fill(self._rows) > 0 or made
        return made
