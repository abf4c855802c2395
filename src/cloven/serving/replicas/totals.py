"""What replicas count, added up: counters go on when a replica ends and another takes its place."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

from cloven.metrics.catalog import BY_NAME, Sample

FRONTS = ("cloven_answers_total", "cloven_waiting_requests")  # the front counts these itself
_LEAST = ("cloven_session_open", "cloven_session_pads_ready", "cloven_session_pads_stored")  # of all replicas
_Key = tuple[str, tuple[str, ...]]


def told_of(samples: Iterable[Sample]) -> list[list[Any]]:
    """A replica's samples as JSON, for the front."""
    return [[sample.name, sample.value, list(sample.labels)] for sample in samples if sample.name not in FRONTS]


class Totals:
    """Sums over replicas; safe to use from several threads."""

    def __init__(self) -> None:
        self._live: dict[int, dict[_Key, float]] = {}
        self._gone: dict[_Key, float] = {}
        self._lock = threading.Lock()

    def heard(self, replica: int, told: Iterable[list[Any]]) -> None:
        """A replica's numbers, in the place of its earlier ones."""
        with self._lock:
            self._live[replica] = {(name, tuple(labels)): value for name, value, labels in told}

    def gone(self, replica: int) -> None:
        """It counts no longer; what it has counted stays."""
        with self._lock:
            for key, value in self._live.pop(replica, {}).items():
                if BY_NAME[key[0]].kind == "counter":
                    self._gone[key] = self._gone.get(key, 0.0) + value

    def samples(self) -> Iterator[Sample]:
        """See `cloven.metrics.catalog.Source`."""
        with self._lock:
            found: list[list[tuple[_Key, float]]] = [list(one.items()) for one in (self._gone, *self._live.values())]
        totals: dict[_Key, float] = {}
        for key, value in (pair for one in found for pair in one):
            if key not in totals:
                totals[key] = float(value)
            elif key[0] in _LEAST:
                totals[key] = min(totals[key], value)
            else:
                totals[key] += value
        for (name, labels), value in totals.items():
            yield Sample(name, value, labels)
