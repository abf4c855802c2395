"""Counts and logs: what the channel did per layer, and the logger `cloven`. Numbers only, never contents."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass

logger = logging.getLogger("cloven")
logger.addHandler(logging.NullHandler())


def configure_logging(default: str = "WARNING") -> None:
    """Send cloven's log to standard error, at the level that CLOVEN_LOG names (DEBUG, INFO, WARNING, ERROR)."""
    level = os.environ.get("CLOVEN_LOG", default).upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        level = default
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(level)


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
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Telemetry:
    """Statistics per layer; safe to use from several threads."""

    def __init__(self) -> None:
        self._layers: dict[str, LayerStatistics] = {}
        self._lock = threading.Lock()

    def record(self, layer: str, record: LayerStatistics) -> None:
        """Count one exchange of a layer."""
        with self._lock:
            self._layers.setdefault(layer, LayerStatistics()).add(record)

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

    def reset(self) -> None:
        """Forget everything counted so far."""
        with self._lock:
            self._layers.clear()
