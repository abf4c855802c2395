"""The background thread that makes pads: keeps sources filled, pauses, stops, and reports the error that ended it."""

from __future__ import annotations

import threading
import time

from cloven.errors import ClovenError, RunError, VerificationFailed
from cloven.masks.look_ahead import LookAhead


class Source:
    """Counts what it is asked for; fails when told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.ready = 0
        self.fills: list[int] = []
        self._error = error

    def fill(self, rows: int) -> int:
        if self._error is not None:
            raise self._error
        self.fills.append(rows)
        made, self.ready = rows - self.ready, rows
        return made


def wait_until(condition: object, seconds: float = 5.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def no_error(error: ClovenError) -> None:
    raise AssertionError(error)


def test_sources_are_filled_and_refilled_at_half() -> None:
    sources = [Source(), Source()]
    ahead = LookAhead(sources, 8, no_error)
    try:
        wait_until(lambda: all(source.ready == 8 for source in sources))
        sources[0].ready, sources[1].ready = 5, 4  # above half: left alone; at half: refilled
        wait_until(lambda: sources[1].ready == 8)
        time.sleep(0.15)
        assert sources[0].ready == 5 and sources[0].fills == [8]
    finally:
        ahead.stop()


def test_none_in_advance() -> None:
    source = Source()
    ahead = LookAhead([source], 0, no_error)
    time.sleep(0.1)
    ahead.stop()
    assert source.fills == []


def test_a_bad_pad_is_reported_once_and_ends_the_thread() -> None:
    errors: list[ClovenError] = []
    seen = threading.Event()
    ahead = LookAhead([Source(VerificationFailed("a pad made for x is wrong"))], 8, lambda error: (errors.append(error), seen.set())[1])
    assert seen.wait(5)
    ahead.stop()
    assert len(errors) == 1 and isinstance(errors[0], VerificationFailed)


def test_an_unexpected_error_names_its_type_only() -> None:
    errors: list[ClovenError] = []
    seen = threading.Event()
    ahead = LookAhead([Source(ValueError("values of the pad: 17, 4"))], 8, lambda error: (errors.append(error), seen.set())[1])
    assert seen.wait(5)
    ahead.stop()
    assert isinstance(errors[0], RunError) and "ValueError" in str(errors[0]) and "17" not in str(errors[0])


def test_stopping_from_its_own_thread_does_not_wait_for_itself() -> None:
    done = threading.Event()
    holder: list[LookAhead] = []
    ready = threading.Event()

    def end(_: ClovenError) -> None:
        ready.wait(5)
        holder[0].stop()
        done.set()

    holder.append(LookAhead([Source(RunError("x"))], 8, end))
    ready.set()
    assert done.wait(5)
