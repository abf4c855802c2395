"""What the front does itself: who may ask, what waits, and how an answer comes through."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from cloven.serving.api_keys import ApiKeys
from cloven.serving.replicas import fleet as fleet_module
from cloven.serving.replicas.front import _Piped
from tests.served import run
from tests.serving.replicas.fakes import NAME, PIECES, ask, by, front, until

KEY, OTHER = "k" * 32, "o" * 32


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(fleet_module, "_FIRST_WAIT", 0.02)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_routes() -> None:
    async def test() -> None:
        async with front() as (client, _, launcher):
            assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == [NAME]
            assert (await client.get(f"/v1/models/{NAME}")).json()["owned_by"] == "cloven"
            for path in ("/v1/models/other", "/replica", "/load_model", "/"):
                assert (await client.get(path)).status_code == 404, path
            assert (await client.get("/v1/completions")).status_code == 405
            assert not any(replica.asked for replica in launcher.replicas)

    run(test)


def test_keys_are_asked_for_in_front_and_separate_sessions() -> None:
    async def test() -> None:
        async with front(replicas=2, running=8, keys=ApiKeys([KEY, OTHER])) as (client, _, launcher):
            for headers in ({}, bearer("x" * 32)):
                assert (await ask(client, headers=headers)).status_code == 401
            assert not any(replica.asked for replica in launcher.replicas)
            first = await by(client, bearer(KEY), user="a")
            own = next(replica for replica in launcher.replicas if replica.name == first)
            busy = asyncio.create_task(ask(client, "slow", bearer(KEY), user="a"))
            await until(lambda: "slow" in own.asked)
            assert await by(client, bearer(OTHER), user="a") != first  # the same user of another key
            assert await by(client, bearer(KEY), user="a") == first
            own.released.set()
            await busy

    run(test)


def test_what_is_wrong_reaches_no_replica() -> None:
    async def test() -> None:
        async with front(max_body=2000, max_tokens=9) as (client, _, launcher):
            wrong: list[dict[str, Any]] = [
                {"logprobs": 5},
                {"max_tokens": 10},
                {"nonsense": 1},
                {"model": "other"},
                {"user": 5},
                {"user": "u" * 300},
            ]
            for more in wrong:
                assert (await ask(client, **more)).status_code in (400, 404), more
            assert (await ask(client, "x" * 3000)).status_code == 413
            assert (await ask(client, headers={"X-Cloven-Session": "s" * 300})).status_code == 400
            assert (await client.post("/v1/completions", content=b"[1]", headers={"content-type": "application/json"})).status_code == 400
            assert not any(replica.asked for replica in launcher.replicas)

    run(test)


def test_the_queue_is_one_for_all() -> None:
    """Two replicas of one request each, and one may wait."""

    async def test() -> None:
        async with front(replicas=2, running=1, max_queue=1) as (client, fleet, launcher):
            taken = [asyncio.create_task(ask(client, "slow")) for _ in range(2)]
            for replica in launcher.replicas:
                await asyncio.wait_for(replica.begun.wait(), 5)
            waits = asyncio.create_task(ask(client, "hello"))
            await until(lambda: sum(replica.turns.waiting for replica in fleet.live) == 1)
            refused = await ask(client)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full" and refused.headers["retry-after"] == "1"
            for replica in launcher.replicas:
                replica.released.set()
            assert [(await one).status_code for one in (*taken, waits)] == [200, 200, 200]
            assert all(replica.turns.free == 1 and replica.busy == 0 for replica in fleet.live)

    run(test)


def test_a_free_replica_takes_one_although_the_queue_is_full() -> None:
    async def test() -> None:
        async with front(replicas=2, running=1, max_queue=1) as (client, fleet, launcher):
            first = await by(client, user="a")
            own = next(replica for replica in launcher.replicas if replica.name == first)
            taken = asyncio.create_task(ask(client, "slow", user="a"))
            await until(lambda: "slow" in own.asked)
            waits = asyncio.create_task(ask(client, user="a"))
            await until(lambda: sum(replica.turns.waiting for replica in fleet.live) == 1)
            assert (await ask(client, user="a")).status_code == 429
            assert await by(client) != first
            own.released.set()
            await asyncio.gather(taken, waits)

    run(test)


def test_streams_come_through_as_they_are() -> None:
    async def test() -> None:
        async with front(replicas=1) as (client, fleet, launcher):
            launcher.replicas[0].released.set()
            answer = await ask(client, "stream", stream=True)
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.text == "data: {}\n\n" * PIECES + "data: [DONE]\n\n"
            assert fleet.live[0].busy == 0 and fleet.live[0].turns.free == 2

    run(test)


@pytest.mark.parametrize("kind", ["stream", "half"])
def test_a_stream_whose_replica_dies_ends_with_an_error(kind: str) -> None:
    """As an event of its own, also after half of one; and without `[DONE]`."""

    async def test() -> None:
        async with front(replicas=1) as (client, _, launcher):
            asked = asyncio.create_task(ask(client, kind, stream=True))
            await asyncio.wait_for(launcher.replicas[0].begun.wait(), 5)
            await asyncio.sleep(0.1)
            await launcher.replicas[0].die()
            written = (await asked).text
            *_, last = [event for event in written.split("\n\n") if event]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
            assert "[DONE]" not in written and written.startswith("data: {")

    run(test)


@pytest.mark.parametrize("prompt", ["slow", "stream"])
def test_who_leaves_frees_the_replica(prompt: str) -> None:
    """On a real socket: the replica hears that nobody reads any longer."""

    async def test() -> None:
        async with front(replicas=1, running=1) as (client, fleet, launcher):
            app = client._transport.app  # type: ignore[attr-defined]
            scope = scope_of(prompt)
            left = asyncio.Event()
            sent: list[Any] = []

            async def receive() -> dict[str, Any]:
                if not sent:
                    sent.append(1)
                    return {"type": "http.request", "body": json.dumps({"prompt": prompt, "stream": prompt == "stream"}).encode()}
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(_message: Any) -> None:
                return None

            asked = asyncio.create_task(app(scope, receive, send))
            await asyncio.wait_for(launcher.replicas[0].begun.wait(), 5)
            left.set()
            await asyncio.wait_for(asked, 5)
            await until(lambda: launcher.replicas[0].left == 1)
            assert fleet.live[0].busy == 0 and fleet.live[0].turns.free == 1
            assert await by(client) == "r1"

    run(test)


def scope_of(_prompt: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }


def test_stopping() -> None:
    async def test() -> None:
        async with front() as (client, fleet, _):
            await fleet.stop()
            answer = await ask(client)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping"

    run(test)


def test_errors_are_told_without_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with front() as (client, fleet, _):

            async def broken(_session: object) -> None:
                raise ZeroDivisionError("Xylophone")

            monkeypatch.setattr(fleet, "turn", broken)
            answer: httpx.Response = await ask(client)
            assert answer.status_code == 500 and "Xylophone" not in answer.text

    run(test)


def test_who_does_not_read_keeps_no_turn() -> None:
    """The answer is fetched as it is computed; the turn is given back when that is over, and once."""

    async def test() -> None:
        given_back, reads = list[bool](), asyncio.Event()
        taken = contextlib.AsyncExitStack()
        taken.callback(given_back.append, True)

        async def pieces() -> AsyncIterator[bytes]:
            for number in range(100):
                yield b"%d" % number

        got = list[bytes]()

        async def send(message: Any) -> None:
            await reads.wait()
            got.append(message.get("body", b""))

        async def receive() -> Any:
            await asyncio.Event().wait()

        answering = asyncio.create_task(_Piped(pieces(), taken)({"type": "http"}, receive, send))
        await until(lambda: bool(given_back))
        assert not answering.done()
        reads.set()
        await answering
        assert b"".join(got) == b"".join(b"%d" % number for number in range(100)) and given_back == [True]

    run(test)


def test_a_turn_is_given_back_whatever_happens() -> None:
    async def test() -> None:
        given_back = list[bool]()
        taken = contextlib.AsyncExitStack()
        taken.callback(given_back.append, True)

        async def pieces() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        answering = asyncio.create_task(_Piped(pieces(), taken)({"type": "http"}, asyncio.Event().wait, asyncio.Queue[Any]().put))
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        answering = asyncio.create_task(_Piped(pieces(), taken)({"type": "http"}, asyncio.Event().wait, asyncio.Queue[Any]().put))
        await asyncio.sleep(0.01)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        assert given_back == [True]

    run(test)


def test_numbers_for_prometheus() -> None:
    async def test() -> None:
        async with front(replicas=2) as (client, fleet, launcher):
            await ask(client)
            await ask(client, nonsense=1)
            assert launcher.front is not None
            counts = {(one.name, one.labels): one.value for one in launcher.front.samples()}
            assert counts["cloven_replicas", ()] == counts["cloven_replicas_live", ()] == 2 and counts["cloven_waiting_requests", ()] == 0
            assert counts["cloven_answers_total", ("200",)] == counts["cloven_answers_total", ("400",)] == 1
            assert "cloven_tokens_total" not in {name for name, _ in counts}
            assert fleet.live

    run(test)
