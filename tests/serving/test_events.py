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


def test_what_it_took_in_a_piece_of_its_own() -> None:
    """As OpenAI's API has it, for who has asked; nothing else is touched, whatever a text looks like."""
    end = {"id": "1", "choices": [{"finish_reason": "length"}], "usage": {"total_tokens": 3}}
    last = f"data: {json.dumps(end, separators=(',', ':'))}\n\n"
    looks = 'data: {"choices":[{"text":"\\"usage\\":{"}]}\n\n'

    async def scenario() -> None:
        for usage in (False, True):
            told = [piece async for piece in events(written("a", looks, "data: {}\n\n" + last), Generation(), usage)]  # type: ignore[arg-type]
            assert told[:2] == ["a", looks] and told[3:] == ["data: [DONE]\n\n"]
            found = [json.loads(event.removeprefix("data: ")) for event in told[2].split("\n\n")[:-1]]
            without = {name: value for name, value in end.items() if name != "usage"}
            assert found == ([{}, without, {**end, "choices": []}] if usage else [{}, end])

    run(scenario)
