from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from cloven.errors import BadInput, RunError
from cloven.metrics.structured_log import configure_log
from cloven.telemetry import log_event, logger


@pytest.fixture(autouse=True)
def restored_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CLOVEN_LOG", raising=False)
    handlers, level = logger.handlers, logger.level
    yield
    logger.handlers = handlers
    logger.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    output = capsys.readouterr()
    assert output.out == ""
    return [json.loads(line) for line in output.err.splitlines()]


def test_events_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("info", "json")
    log_event(logging.INFO, "session_opened", "a session of %s", "local", peer="local", open=2)
    logger.warning('two\nlines, "quoted": %d', 3)
    logger.debug("not wanted")
    first, second = lines(capsys)
    assert list(first)[:2] == ["peer", "open"] and first["event"] == "session_opened" and first["message"] == "a session of local"
    assert (first["level"], first["logger"], first["open"]) == ("INFO", "cloven", 2)
    age = datetime.now(UTC) - datetime.fromisoformat(str(first["time"]))
    assert 0 <= age.total_seconds() < 60
    assert second["event"] == "message" and second["message"] == 'two\nlines, "quoted": 3'


def test_a_field_replaces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("INFO", "json")
    log_event(logging.INFO, "server_started", "right", time="never", logger="another", odd=3 + 4j)  # type: ignore[arg-type]
    (found,) = lines(capsys)
    assert found["message"] == "right" and found["logger"] == "cloven" and found["time"] != "never"
    assert found["odd"] == "complex"  # what JSON has no form for: the type, not the value


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_exception_is_its_type_and_its_lines(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_log(None, form)
    try:
        try:
            int("the prompt")
        except ValueError as error:
            raise KeyError("the key") from error
    except KeyError:
        logger.exception("a request failed")
    text = capsys.readouterr().err
    assert "KeyError" in text and "ValueError" in text and "test_structured_log.py" in text and "a request failed" in text
    assert ": 'the key'" not in text and "invalid literal" not in text
    if form == "json":
        (line,) = text.splitlines()
        assert "caused by" in json.loads(line)["exception"]


def test_our_own_errors_say_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log(None, "json")
    try:
        try:
            int("the prompt")
        except ValueError:
            raise RunError("layer.3: no answer") from None
    except RunError:
        logger.exception("failed")
    (found,) = lines(capsys)
    assert "RunError: layer.3: no answer" in str(found["exception"]) and "ValueError" not in str(found["exception"])


def test_a_circle_of_causes_ends(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log(None, "json")
    one, two = ValueError("a"), ValueError("b")
    one.__cause__, two.__cause__ = two, one
    logger.error("failed", exc_info=one)
    (found,) = lines(capsys)
    assert str(found["exception"]).count("ValueError") == 2


def test_text_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("INFO", "text")
    log_event(logging.INFO, "session_opened", "a session of %s", "local", peer="local")
    assert capsys.readouterr().err.endswith(" INFO cloven: a session of local\n")


@pytest.mark.parametrize(
    ("given", "variable", "level"), [(None, "DEBUG", 10), ("error", "DEBUG", 40), (None, None, 30), ("INFO", None, 20)]
)
def test_levels(given: str | None, variable: str | None, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable is not None:
        monkeypatch.setenv("CLOVEN_LOG", variable)
    configure_log(given, "json")
    assert logger.level == level and len(logger.handlers) == 1


@pytest.mark.parametrize(("level", "form", "match"), [("LOUD", "json", "log level 'LOUD'"), (None, "xml", "log format 'xml'")])
def test_wrong_settings(level: str | None, form: str, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        configure_log(level, form)
