"""Counts and logs: what the channel did per layer, and the logger `cloven`. Numbers only, never contents."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass

logger = logging.getLogger("cloven")
logger.addHandler(logging.NullHandler())
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(default: str = "WARNING", *, level: str | None = None, formatter: logging.Formatter | None = None) -> None:
    """Send cloven's log to standard error.

    Args:
        default: the level where CLOVEN_LOG names none (DEBUG, INFO, WARNING, ERROR).
        level: the level, whatever CLOVEN_LOG says.
        formatter: None: lines of text.
    """
    level = (level or os.environ.get("CLOVEN_LOG", default)).upper()
    if level not in LEVELS:
        level = default
    handler = logging.StreamHandler()
    handler.setFormatter(formatter or logging.Formatter(TEXT_FORMAT))
    logger.handlers = [handler]
    logger.setLevel(level)


def log_event(level: int, event: str, message: str, *arguments: object, **fields: str | int | float) -> None:
    """Log what happened, for people and for machines.

    Args:
        level: of `logging`.
        event: its name, for whoever filters by it.
        message, arguments: as of `logging`.
        fields: more about it; numbers and public names, never contents.
    """
    logger.log(level, message, *arguments, extra={"event": event, "fields": fields}, stacklevel=2)


@dataclass
class LayerStatistics:
    """What one layer's exchanges cost: message bytes with our header, before CURVE and ZeroMQ framing; seconds of
    waiting, and from sending to the answer (which includes trusted work done meanwhile)."""

    exchanges: int = 0
    rows: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds_waiting: float = 0.0
    seconds_round_trip: float = 0.0
    resent: int = 0

    def add(self, other: LayerStatistics) -> None:
        """Add another record to this one."""
        self.exchanges += other.exchanges
        self.rows += other.rows
        self.bytes_up += other.bytes_up
        self.bytes_down += other.bytes_down
        self.seconds_waiting += other.seconds_waiting
        self.seconds_round_trip += other.seconds_round_trip
        self.resent += other.resent


class Telemetry:
    """Statistics per layer; safe to use from several threads."""

    def __init__(self) -> None:
        self._layers: dict[str, LayerStatistics] = {}
        self._failures = 0
        self._lock = threading.Lock()

    def record(self, layer: str, record: LayerStatistics) -> None:
        """Count one exchange of a layer."""
        with self._lock:
            known = self._layers.get(layer)
            if known is None:
                known = self._layers[layer] = LayerStatistics()
            known.add(record)

    def layers(self) -> dict[str, LayerStatistics]:
        """A copy of the statistics, by layer, in the order of first use."""
        with self._lock:
            return {name: LayerStatistics(**vars(record)) for name, record in self._layers.items()}

    def total(self) -> LayerStatistics:
        """The sum over all layers."""
        total = LayerStatistics()
        for record in self.layers().values():
            total.add(record)
        return total

    def verification_failed(self) -> None:
        """Count an answer, or a pad, that failed its check."""
        with self._lock:
            self._failures += 1

    @property
    def verification_failures(self) -> int:
        """How many did; after the first one a session has ended, but several threads can meet one."""
        return self._failures

    def reset(self) -> None:
        """Forget everything counted so far."""
        with self._lock:
            self._layers.clear()
            self._failures = 0
