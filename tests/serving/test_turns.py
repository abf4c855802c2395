from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from cloven.serving.api_error import ApiError, replica_lost
from cloven.serving.turns import Turns


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_first_come_first_served() -> None:
    async def scenario() -> None:
        turns, order = Turns(2, 10), list[int]()

        async def one(number: int) -> None:
            await turns.take()
            order.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(6)]
        await settle()
        assert order == [0, 1] and turns.waiting == 4
        for done in range(2, 6):
            turns.give_back()
            await settle()
            assert order == list(range(done + 1))
        await asyncio.gather(*tasks)

    run(scenario())


def test_too_many_are_refused_and_nobody_else() -> None:
    async def scenario() -> None:
        turns = Turns(1, 2)
        await turns.take()
        waiting = [asyncio.create_task(turns.take()) for _ in range(2)]
        await settle()
        with pytest.raises(ApiError) as caught:
            await turns.take()
        assert caught.value.status == 429 and "2 requests" in caught.value.message
        for task in waiting:
            turns.give_back()
            await task
        turns.give_back()
        await turns.take()

    run(scenario())


def test_none_may_wait() -> None:
    async def scenario() -> None:
        turns = Turns(1, 0)
        await turns.take()
        with pytest.raises(ApiError):
            await turns.take()

    run(scenario())


def test_who_leaves_while_waiting_takes_no_turn() -> None:
    async def scenario() -> None:
        turns = Turns(1, 5)
        await turns.take()
        leaves, stays = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
        await settle()
        leaves.cancel()
        await settle()
        assert turns.waiting == 1
        turns.give_back()
        await stays
        turns.give_back()
        await turns.take()

    run(scenario())


def test_who_leaves_at_the_moment_of_the_turn_hands_it_on() -> None:
    async def scenario() -> None:
        turns = Turns(1, 5)
        await turns.take()
        leaves, stays = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
        await settle()
        turns.give_back()  # to the first one, who is woken and cancelled at once
        leaves.cancel()
        await settle()
        assert leaves.cancelled()
        await asyncio.wait_for(stays, 1)

    run(scenario())


def test_at_the_end_nobody_waits() -> None:
    async def scenario() -> None:
        turns = Turns(1, 5)
        await turns.take()
        waiting = asyncio.create_task(turns.take())
        await settle()
        turns.stop()
        for attempt in (waiting, turns.take()):
            with pytest.raises(ApiError) as caught:
                await attempt
            assert caught.value.code == "stopping"

    run(scenario())


def test_free_turns_and_a_reason_for_the_end() -> None:
    async def scenario() -> None:
        turns = Turns(2, 5)
        assert turns.free == 2
        await turns.take()
        await turns.take()
        assert turns.free == 0
        waits = asyncio.create_task(turns.take())
        await settle()
        turns.stop(replica_lost)
        for late in (waits, turns.take()):
            with pytest.raises(ApiError) as caught:
                await late
            assert caught.value.code == "replica_lost" and caught.value.status == 503

    run(scenario())
