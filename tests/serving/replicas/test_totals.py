from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cloven.metrics.catalog import Sample
from cloven.serving.replicas.totals import Totals, told_of

EXCHANGES, LEFT, OPEN = "cloven_session_exchanges_total", "cloven_session_pads_stored", "cloven_session_open"
LABELS = ("bard",)


def told(exchanges: float, left: float, is_open: float = 1.0) -> list[list[Any]]:
    samples = [Sample(EXCHANGES, exchanges, LABELS), Sample(LEFT, left, LABELS), Sample(OPEN, is_open, LABELS)]
    return told_of([*samples, Sample("cloven_answers_total", 1.0, ("200",)), Sample("cloven_waiting_requests", 1.0)])


def test_counts_are_added_and_the_least_is_left() -> None:
    totals = Totals()
    totals.heard(1, told(5, 100))
    totals.heard(2, told(7, 40, 0.0))
    totals.heard(1, told(6, 90))
    assert list(totals.samples()) == [Sample(EXCHANGES, 13.0, LABELS), Sample(LEFT, 40.0, LABELS), Sample(OPEN, 0.0, LABELS)]


def test_what_the_front_counts_itself_is_not_told_twice() -> None:
    assert {name for name, _, _ in told(1, 2)} == {EXCHANGES, LEFT, OPEN}


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9), st.booleans()), max_size=20))
def test_counters_never_fall(steps: list[tuple[int, int, bool]]) -> None:
    """Whichever replicas end: each number is of one process, which counts upwards."""
    totals, counts, before = Totals(), dict[int, int](), 0.0
    born, alive = 0, dict[int, int]()
    for place, grown, ends in steps:
        if place not in alive:
            born += 1
            alive[place] = born
        replica = alive[place]
        counts[replica] = counts.get(replica, 0) + grown
        totals.heard(replica, told(counts[replica], 1))
        if ends:
            totals.gone(alive.pop(place))
        now = sum(sample.value for sample in totals.samples() if sample.name == EXCHANGES)
        assert now == sum(counts.values()) >= before
        before = now
