from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from cloven.errors import WorkerTimeout
from cloven.serving.events import _FAILURE, events
from tests.served import run


class Generation:
    """What `events` looks at."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure, self.cancelled = failure, 0

    def cancel(self) -> None:
        """Counted."""
        self.cancelled += 1


def test_an_end() -> None:
    async def scenario() -> None:
        generation: Any = Generation()
        assert [piece async for piece in events(written("a", "b"), generation)] == ["a", "b", "data: [DONE]\n\n"]
        assert generation.cancelled == 1

    run(scenario)


def test_an_error_takes_the_place_of_transformers_own() -> None:
    async def scenario() -> None:
        generation: Any = Generation(WorkerTimeout("at ipc:///secret"))
        *before, last = [piece async for piece in events(written("a", "b" + _FAILURE), generation)]
        assert before == ["a"] and last.startswith("bdata: {")
        told = json.loads(last.removeprefix("bdata: "))["error"]
        assert told["code"] == "peer_away" and "secret" not in last

    run(scenario)


def test_a_text_that_looks_like_an_error_is_a_text() -> None:
    async def scenario() -> None:
        generation: Any = Generation()
        assert [piece async for piece in events(written(_FAILURE), generation)] == [_FAILURE, "data: [DONE]\n\n"]

    run(scenario)


def test_a_reader_who_leaves() -> None:
    closed: list[bool] = []

    async def scenario() -> None:
        generation: Any = Generation()
        reading = events(written("a", "b", closed=closed), generation)
        assert await anext(reading) == "a"
        await reading.aclose()
        assert generation.cancelled == 1 and closed == [True]

    run(scenario)


def test_an_error_of_the_handler_is_passed_on() -> None:
    async def broken() -> AsyncGenerator[str, None]:
        yield "a"
        raise KeyError("x")

    async def scenario() -> None:
        generation: Any = Generation()
        with pytest.raises(KeyError):
            _ = [piece async for piece in events(broken(), generation)]
        assert generation.cancelled == 1

    run(scenario)


async def written(*pieces: str, closed: list[bool] | None = None) -> AsyncGenerator[str, None]:
    try:
        for piece in pieces:
            yield piece
    finally:
        if closed is not None:
            closed.append(True)
