"""The log as text for people, or as JSON for machines, one object a line: time, level, logger, event, message, and the event's fields.

An exception is logged as its type and the lines of code that it went through: its message may quote what came over the wire, and stays out
unless it is one of ours, whose messages never quote contents.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from cloven.errors import BadInput, ClovenError
from cloven.telemetry import LEVELS, TEXT_FORMAT, configure_logging

FORMATS = ("text", "json")
_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class TextFormatter(logging.Formatter):
    """Lines for people."""

    def __init__(self) -> None:
        super().__init__(TEXT_FORMAT)

    def formatException(self, ei: _ExcInfo) -> str:
        """See the module."""
        return exception_text(ei)


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """The object; a field of an event never replaces one of the first five."""
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": getattr(record, "event", "message"),
            "message": record.getMessage(),
        }
        found = getattr(record, "fields", {}) | found
        if record.exc_info:
            found["exception"] = exception_text(record.exc_info)
        return json.dumps(found, default=lambda value: type(value).__name__)


def exception_text(ei: _ExcInfo) -> str:
    """Type and lines of code of an exception and of what caused it."""
    parts: list[str] = []
    error = ei[1]
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        message = f": {error}" if isinstance(error, ClovenError) else ""
        parts.append("".join(traceback.format_tb(error.__traceback__)) + type(error).__name__ + message)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\ncaused by:\n".join(parts)


def configure_log(level: str | None, form: str) -> None:
    """Set the log of a server up.

    Args:
        level: DEBUG, INFO, WARNING or ERROR; None: what CLOVEN_LOG says, else WARNING.
        form: text or json.

    Raises:
        BadInput: another level or form.
    """
    if form not in FORMATS:
        raise BadInput(f"log format {form!r}: choose {' or '.join(FORMATS)}")
    if level is not None and level.upper() not in LEVELS:
        raise BadInput(f"log level {level!r}: choose one of {', '.join(LEVELS)}")
    configure_logging(level=level, formatter=JsonFormatter() if form == "json" else TextFormatter())
