from __future__ import annotations

import logging
import threading
import time

import pytest

from cloven.serving.engine import Engine


def test_one_after_the_other_in_one_thread() -> None:
    engine, seen = Engine(), list[tuple[int, str]]()
    for number in range(20):
        engine.submit(lambda number=number: seen.append((number, threading.current_thread().name)))  # type: ignore[misc]
    assert engine.stop(5)
    assert seen == [(number, "cloven-model") for number in range(20)]


def test_work_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine, done = Engine(), threading.Event()

    def fail() -> None:
        raise RuntimeError("Xylophone")

    with caplog.at_level(logging.ERROR, "cloven"):
        engine.submit(fail)
        engine.submit(done.set)
        assert done.wait(5) and engine.stop(5)
    assert "RuntimeError" in caplog.text and "Xylophone" not in caplog.text


def test_work_that_does_not_end() -> None:
    engine, release = Engine(), threading.Event()
    engine.submit(lambda: release.wait(10) and None)
    started = time.monotonic()
    assert not engine.stop(0.1)
    assert time.monotonic() - started < 5
    release.set()
    assert engine.stop(5)
