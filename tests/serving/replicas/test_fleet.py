"""Which replica gets a request, and what happens when one is gone, silent, or has been lied to."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from cloven.metrics.catalog import Sample
from cloven.serving.model import AWAY, ENDED, READY
from cloven.serving.replicas import fleet as fleet_module
from cloven.serving.replicas.fleet import Fleet
from tests.served import run
from tests.serving.replicas.fakes import FakeLauncher, ask, by, front, until


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fleet_module._FIRST_WAIT >= 0.5 and fleet_module._SILENT_SECONDS >= 10
    monkeypatch.setattr(fleet_module, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(fleet_module, "_FIRST_WAIT", 0.02)


def test_requests_without_a_session_go_where_there_is_least_to_do() -> None:
    async def test() -> None:
        async with front(replicas=3) as (client, _, launcher):
            slow = [asyncio.create_task(ask(client, "slow")) for _ in range(3)]
            for replica in launcher.replicas:
                await asyncio.wait_for(replica.begun.wait(), 5)
            for replica in launcher.replicas:
                replica.released.set()
            assert sorted([(await one).json()["by"] for one in slow]) == ["r1", "r2", "r3"]

    run(test)


def test_a_session_stays_where_it_is() -> None:
    """Whatever else is done meanwhile; another user's may go elsewhere."""

    async def test() -> None:
        async with front(replicas=2, running=8) as (client, _, launcher):
            first = await by(client, user="a")
            own = next(replica for replica in launcher.replicas if replica.name == first)
            busy = [asyncio.create_task(ask(client, "slow", user="a")) for _ in range(3)]
            await until(lambda: len(own.asked) == 4)
            assert await by(client, user="b") != first
            assert [await by(client, user="a") for _ in range(5)] == [first] * 5
            own.released.set()
            assert [(await one).json()["by"] for one in busy] == [first] * 3

    run(test)


def test_the_header_is_a_session_too() -> None:
    async def test() -> None:
        async with front(replicas=2, running=8) as (client, _, launcher):
            first = await by(client, {"X-Cloven-Session": "s"}, user="whoever")
            own = next(replica for replica in launcher.replicas if replica.name == first)
            busy = asyncio.create_task(ask(client, "slow", {"X-Cloven-Session": "s"}, user="another"))
            await until(lambda: "slow" in own.asked)
            assert await by(client, {"X-Cloven-Session": "s"}) == first
            assert await by(client, user="whoever") != first
            own.released.set()
            await busy

    run(test)


def test_a_replica_that_dies(caplog: pytest.LogCaptureFixture) -> None:
    """Its request fails, its session goes elsewhere, another one is started."""

    async def test() -> None:
        async with front(replicas=2) as (client, fleet, launcher):
            first = await by(client, user="a")
            own, other = sorted(launcher.replicas, key=lambda replica: replica.name != first)
            lost = asyncio.create_task(ask(client, "slow", user="a"))
            await until(lambda: "slow" in own.asked)
            await own.die()
            answer = await lost
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost" and answer.headers["retry-after"] == "1"
            assert await by(client, user="a") == other.name
            await until(lambda: len(fleet.live) == 2)
            assert own.stopped and launcher.tries == 1
            assert await by(client, user="a") == other.name  # and not back
            assert {await by(client, user=str(number)) for number in range(8)} <= {"r2", "r1", "r3"} - {own.name}
            assert (await client.get("/health")).json() == {"status": "ok", "replicas": 2, "live": 2}

    with caplog.at_level(logging.WARNING, "cloven"):
        run(test)
    assert any("has ended: its requests have failed" in line for line in caplog.messages)


def test_a_connection_that_breaks_is_as_good_as_dead_for_new_sessions() -> None:
    """Before Ray says that the process has ended."""

    async def test() -> None:
        async with front(replicas=2) as (client, _, launcher):
            first = await by(client, user="a")
            own = next(replica for replica in launcher.replicas if replica.name == first)
            await own.die(noticed=False)
            statuses = {(await ask(client, user="a")).status_code for _ in range(3)}
            assert statuses <= {200, 503}
            assert await by(client, user="a") != first
            assert {await by(client) for _ in range(4)} == {"r1", "r2"} - {first}

    run(test)


def test_who_has_only_waited_goes_elsewhere() -> None:
    """Nothing of it was sent."""

    async def test() -> None:
        async with front(replicas=2, running=1) as (client, fleet, launcher):
            first = await by(client, user="a")
            own = next(replica for replica in launcher.replicas if replica.name == first)
            computed = asyncio.create_task(ask(client, "slow", user="a"))
            await until(lambda: "slow" in own.asked)
            waits = asyncio.create_task(ask(client, "hello", user="a"))
            await until(lambda: sum(one.turns.waiting for one in fleet.live) == 1)
            await own.die()
            assert (await computed).status_code == 503
            answer = await waits
            assert answer.status_code == 200 and answer.json()["by"] != first

    run(test)


def test_all_are_gone_and_come_back() -> None:
    async def test() -> None:
        async with front(replicas=1) as (client, fleet, launcher):
            launcher.refusals = 3
            await launcher.replicas[0].die()
            await until(lambda: not fleet.live)
            answer = await ask(client)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost"
            health = await client.get("/health")
            assert health.status_code == 503 and health.json() == {"status": "away", "replicas": 1, "live": 0}
            await until(lambda: len(fleet.live) == 1)
            assert launcher.tries == 4 and await by(client) == "r2"

    run(test)


def test_tries_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_FIRST_WAIT", 0.1)

    async def test() -> None:
        async with front(replicas=1) as (_, fleet, launcher):
            launcher.refusals = 1000
            await launcher.replicas[0].die()
            await asyncio.sleep(1.2)
            assert 2 <= launcher.tries <= 4  # after 0.1, 0.3, 0.7, 1.5 s
            assert not fleet.live

    run(test)


def test_one_that_is_silent_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_SILENT_SECONDS", 0.3)
    monkeypatch.setattr(fleet_module, "_ANSWER_SECONDS", 0.1)

    async def test() -> None:
        async with front(replicas=1) as (client, _, launcher):
            launcher.replicas[0].silent = True
            answer = await ask(client, "slow")
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost"
            await until(lambda: len(launcher.replicas) == 2 and launcher.replicas[0].stopped)

    run(test)


def test_one_that_is_busy_keeps_its_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_ANSWER_SECONDS", 0.05)

    async def test() -> None:
        async with front(replicas=2) as (client, _, launcher):
            first = await by(client, user="a")
            own = next(replica for replica in launcher.replicas if replica.name == first)
            own.silent = True
            await asyncio.sleep(0.3)
            assert await by(client, user="a") == first

    run(test)


@pytest.mark.parametrize("how", ["answer", "look"])
def test_a_failed_verification_ends_all(how: str) -> None:
    """Heard with an answer or with a look: no other replica gives the worker another try, and none is started."""

    async def test() -> None:
        async with front(replicas=2) as (client, fleet, launcher):
            if how == "answer":
                assert (await ask(client, "fail verification_failed")).status_code == 503
            else:
                launcher.replicas[1].state = ENDED
                await until(lambda: fleet.state == ENDED)
            for _ in range(4):
                answer = await ask(client)
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "session_ended"
            await launcher.replicas[0].die()
            await asyncio.sleep(0.3)
            assert launcher.tries == 0 and (await client.get("/health")).json()["status"] == "ended"

    run(test)


def test_errors_of_one_request_end_nothing() -> None:
    async def test() -> None:
        async with front() as (client, fleet, _):
            answer = await ask(client, "fail peer_failed")
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and answer.json()["error"]["code"] == "peer_failed"
            assert fleet.state == READY

    run(test)


def test_the_worker_is_away() -> None:
    """For one replica: others are asked. For all: refused at once."""

    async def test() -> None:
        async with front(replicas=2) as (client, fleet, launcher):
            launcher.replicas[0].state = AWAY
            await until(lambda: fleet.live[0].state == AWAY)
            assert {await by(client) for _ in range(4)} == {"r2"} and fleet.state == READY
            launcher.replicas[1].state = AWAY
            await until(lambda: fleet.state == AWAY)
            answer = await ask(client)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "peer_away"
            launcher.replicas[0].state = launcher.replicas[1].state = READY
            await until(lambda: fleet.state == READY)
            assert await by(client) in ("r1", "r2")

    run(test)


def test_logs_come_to_the_front(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with front(replicas=2) as (_, _, launcher):
            launcher.replicas[1].log = [(logging.WARNING, "the other half is away"), (12345, "odd level")]
            await until(lambda: not launcher.replicas[1].log)
            await asyncio.sleep(0.05)

    with caplog.at_level(logging.INFO, "cloven"):
        run(test)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "replica 2: the other half is away"),
        (logging.WARNING, "replica 2: odd level"),
    ]


def test_the_end() -> None:
    """All are stopped; so is one that was being started meanwhile."""

    async def test() -> None:
        launcher = FakeLauncher()
        fleet = Fleet(launcher, [await launcher.make() for _ in range(2)], 4)
        fleet.begin()
        await until(lambda: len(fleet.live) == 2)
        await launcher.replicas[0].die()
        await until(lambda: launcher.tries == 1)
        await fleet.stop()
        assert not fleet.live and all(replica.stopped for replica in launcher.replicas[1:])

    run(test)


def test_a_front_that_was_late_blames_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that keeps the front itself busy must not end all replicas."""
    for name, seconds in (("_ANSWER_SECONDS", 0.2), ("_SILENT_SECONDS", 0.6), ("_LATE_SECONDS", 0.1)):
        monkeypatch.setattr(fleet_module, name, seconds)

    async def test() -> None:
        async with front(replicas=2) as (client, fleet, launcher):
            for _ in range(5):
                time.sleep(0.5)
                await asyncio.sleep(0.03)
            assert len(fleet.live) == 2 and len(launcher.replicas) == 2
            assert (await ask(client)).status_code == 200

    run(test)


def test_when_the_server_stops() -> None:
    """Nobody gets a turn; who is being answered is told so in the end."""

    async def test() -> None:
        async with front() as (client, fleet, launcher):
            slow = asyncio.create_task(ask(client, "slow"))
            await until(lambda: bool(launcher.replicas[0].asked))
            fleet.refuse()
            assert (await ask(client)).json()["error"]["code"] == "stopping"
            await asyncio.sleep(0.05)
            assert not slow.done()
            fleet.end_answers()
            assert (await slow).json()["error"]["code"] == "stopping"

    run(test)


def test_counts_of_all_replicas() -> None:
    async def test() -> None:
        async with front(replicas=2) as (_, fleet, launcher):
            for number, replica in enumerate(launcher.replicas):
                replica.samples = [["cloven_tokens_total", 10 + number, []]]
            await until(lambda: list(fleet.totals.samples()) == [Sample("cloven_tokens_total", 21.0)])
            await launcher.replicas[0].die()
            await until(lambda: len(launcher.replicas) == 3)
            assert list(fleet.totals.samples()) == [Sample("cloven_tokens_total", 21.0)]

    run(test)
