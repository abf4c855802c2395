from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from cloven.telemetry import LayerStatistics, Telemetry, configure_logging, logger


@pytest.fixture
def restored_logger() -> Iterator[None]:
    handlers, level = logger.handlers, logger.level
    yield
    logger.handlers = handlers
    logger.setLevel(level)


def test_counting() -> None:
    telemetry = Telemetry()
    telemetry.record("b", LayerStatistics(1, 2, 3, 4, 0.5, 6))
    telemetry.record("a", LayerStatistics(1, 1, 1, 1, 0.25, 1))
    telemetry.record("b", LayerStatistics(10, 20, 30, 40, 5.0, 60))
    assert telemetry.layers() == {"b": LayerStatistics(11, 22, 33, 44, 5.5, 66), "a": LayerStatistics(1, 1, 1, 1, 0.25, 1)}
    assert list(telemetry.layers()) == ["b", "a"]  # in the order of first use
    assert telemetry.total() == LayerStatistics(12, 23, 34, 45, 5.75, 67)
    telemetry.reset()
    assert telemetry.layers() == {}
    assert telemetry.total() == LayerStatistics()


def test_what_is_given_out_is_a_copy() -> None:
    telemetry = Telemetry()
    mine = LayerStatistics(exchanges=1)
    telemetry.record("a", mine)
    mine.exchanges = 100
    telemetry.layers()["a"].exchanges = 100
    assert telemetry.total().exchanges == 1


def test_threads() -> None:
    telemetry = Telemetry()

    def count() -> None:
        for i in range(500):
            telemetry.record(f"layer-{i % 3}", LayerStatistics(exchanges=1, rows=2))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (telemetry.total().exchanges, telemetry.total().rows) == (4000, 8000)


@pytest.mark.parametrize(
    ("variable", "level"),
    [("DEBUG", logging.DEBUG), ("info", logging.INFO), ("ERROR", logging.ERROR), ("nonsense", logging.WARNING), (None, logging.WARNING)],
)
@pytest.mark.usefixtures("restored_logger")
def test_the_level_comes_from_the_environment(variable: str | None, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable is None:
        monkeypatch.delenv("CLOVEN_LOG", raising=False)
    else:
        monkeypatch.setenv("CLOVEN_LOG", variable)
    configure_logging()
    configure_logging()
    assert logger.level == level
    assert len(logger.handlers) == 1  # called twice, it logs once


@pytest.mark.usefixtures("restored_logger")
def test_it_logs_to_standard_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLOVEN_LOG", "INFO")
    configure_logging()
    logger.info("answered %d", 3)
    output = capsys.readouterr()
    assert output.out == ""
    assert "INFO cloven: answered 3" in output.err


def test_a_library_is_silent_by_default() -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
