"""The trusted side's numbers: what its sessions asked, waited for and refused, and how many pads are left.

    metrics = SessionMetrics()
    metrics.watch("demo", session)
    MetricsEndpoint(host, port, "serve", [metrics.samples])

`watch` again after a new `attach`: what the model's earlier sessions counted stays counted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from cloven.metrics.catalog import Sample
from cloven.telemetry import LayerStatistics, Telemetry

_COUNTS = (
    ("cloven_session_exchanges_total", "exchanges"),
    ("cloven_session_rows_total", "rows"),
    ("cloven_session_sent_bytes_total", "bytes_up"),
    ("cloven_session_received_bytes_total", "bytes_down"),
    ("cloven_session_wait_seconds_total", "seconds_waiting"),
    ("cloven_session_round_trip_seconds_total", "seconds_round_trip"),
    ("cloven_session_resent_total", "resent"),
)


class WatchedSession(Protocol):
    """What is read of a session (see `cloven.model.runtime.Session`): numbers only."""

    @property
    def telemetry(self) -> Telemetry:
        """Its counts."""

    @property
    def closed(self) -> bool:
        """Whether it has ended."""

    def pads_ready(self) -> int | None:
        """Rows of pads or masks that are ready, of the group that has fewest; None where there are none."""

    def pads_stored(self) -> int | None:
        """Rows left in the pad store, likewise; None where there is none."""


@dataclass
class _Watched:
    session: WatchedSession
    before: LayerStatistics = field(default_factory=LayerStatistics)  # of the model's earlier sessions
    failures_before: int = 0


class SessionMetrics:
    """Samples of the sessions of a process; safe to use from several threads.

    Guarantee: counts and sizes, never contents; an ended session is kept until another one of the same model takes its place, but neither
    its keys nor its pads, which it has dropped.
    """

    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()

    def watch(self, model: str, session: WatchedSession) -> None:
        """Publish a session's numbers under a model's name, instead of the session that had it before."""
        with self._lock:
            watched = _Watched(session)
            previous = self._watched.get(model)
            if previous is not None and previous.session is session:
                return
            if previous is not None:
                watched.before.add(previous.before)
                watched.before.add(previous.session.telemetry.total())
                watched.failures_before = previous.failures_before + previous.session.telemetry.verification_failures
            self._watched[model] = watched

    def samples(self) -> Iterator[Sample]:
        """See `cloven.metrics.catalog.Source`."""
        with self._lock:
            watched = list(self._watched.items())
        for model, one in watched:
            yield from _samples(model, one)


def _samples(model: str, one: _Watched) -> Iterator[Sample]:
    labels, session = (model,), one.session
    yield Sample("cloven_session_open", float(not session.closed), labels)
    total = session.telemetry.total()
    total.add(one.before)
    for name, count in _COUNTS:
        yield Sample(name, float(getattr(total, count)), labels)
    failures = one.failures_before + session.telemetry.verification_failures
    yield Sample("cloven_session_verification_failures_total", float(failures), labels)
    for name, left in (("cloven_session_pads_ready", session.pads_ready()), ("cloven_session_pads_stored", session.pads_stored())):
        if left is not None:
            yield Sample(name, float(left), labels)
