"""Comparisons over the unsplit model: protected and original are the same here, unless a test makes them differ."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cloven.errors import BadInput, WorkerUnreachable
from cloven.serving.comparison import Run, checked_comparison
from cloven.serving.original import Original
from cloven.zoo.demo import demo_model_path
from tests.served import endpoint, generated, plain_model, run, text_of
from tests.split_models import tiny_folder

PATH = "/compare"
ORIGINAL: dict[str, Any] = {"compare": demo_model_path()}
BODY: dict[str, Any] = {"prompt": "ROMEO:", "max_tokens": 8}


def test_rates() -> None:
    assert Run([1, 2, 3], 0.5, 0.5).rate() == 4.0
    assert Run([1], 0.5, 0.0).rate() is None and Run([], 0.5, 0.0).rate() is None


@pytest.mark.parametrize("running", [1, 4])
@pytest.mark.parametrize("fixed", [False, True])
def test_both_texts_and_their_rates(running: int, fixed: bool) -> None:
    expected = text_of(generated("ROMEO:", 8))

    async def scenario() -> None:
        async with endpoint(max_running=running, fixed_length=fixed, **ORIGINAL) as (client, made, _):
            for body in (BODY, {**BODY, "prompt": None, "messages": [{"role": "user", "content": "ROMEO:"}]}):
                answer = (await client.post(PATH, json={name: value for name, value in body.items() if value is not None})).json()
                assert answer["equal"] is True and answer["others"] == 0
                for one in ("protected", "unprotected"):
                    assert answer[one]["text"] == expected and answer[one]["tokens"] == 8
                    assert answer[one]["tokens_per_s"] > 0 and answer[one]["seconds_to_first"] > 0
            assert not made._running and made.turns._free == running

    run(scenario)


def test_an_end_is_an_end_in_both() -> None:
    model, _ = plain_model()
    tokens = generated("ROMEO:", 20)
    end = tokens[6]

    async def scenario() -> None:
        for fixed in (False, True):
            async with endpoint(max_running=1, fixed_length=fixed, **ORIGINAL) as (client, _, _):
                kept, model.generation_config.eos_token_id = model.generation_config.eos_token_id, end
                try:
                    answer = (await client.post(PATH, json={**BODY, "max_tokens": 20})).json()
                finally:
                    model.generation_config.eos_token_id = kept
                assert answer["protected"]["tokens"] == answer["unprotected"]["tokens"] == tokens.index(end) + 1 and answer["equal"]

    run(scenario)


def test_texts_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer says so, and holds both."""
    load = Original.model

    def other(self: Original) -> Any:
        model = load(self)
        model.lm_head.weight.data.neg_()
        return model

    monkeypatch.setattr(Original, "model", other)

    async def scenario() -> None:
        async with endpoint(max_running=1, **ORIGINAL) as (client, _, _):
            answer = (await client.post(PATH, json=BODY)).json()
            assert answer["equal"] is False and answer["protected"]["text"] == text_of(generated("ROMEO:", 8))
            assert answer["unprotected"]["text"] != answer["protected"]["text"]

    run(scenario)


def test_it_takes_turns_with_others() -> None:
    """One at once: whoever came first is done first. Several at once: it says that it was not alone."""

    async def scenario() -> None:
        async with endpoint(max_running=1, **ORIGINAL) as (client, made, _):
            ended: list[str] = []

            async def ask(name: str, path: str, body: dict[str, Any]) -> Any:
                answer = await client.post(path, json=body)
                ended.append(name)
                return answer.json()

            first = asyncio.create_task(ask("first", "/v1/completions", {**BODY, "max_tokens": 60}))
            while not made._running:
                await asyncio.sleep(0.005)
            second = asyncio.create_task(ask("second", PATH, BODY))
            while made.turns.waiting < 1:
                await asyncio.sleep(0.005)
            third = asyncio.create_task(ask("third", "/v1/completions", BODY))
            results = await asyncio.gather(first, second, third)
            assert ended == ["first", "second", "third"] and results[1]["others"] == 0
        async with endpoint(max_running=4, max_tokens=240, **ORIGINAL) as (client, made, _):
            assert (await client.post(PATH, json=BODY)).json()["others"] == 0  # from here on the original is loaded
            beside = asyncio.create_task(client.post("/v1/completions", json={**BODY, "max_tokens": 240}))
            while not made._running:
                await asyncio.sleep(0.005)
            assert (await client.post(PATH, json=BODY)).json()["others"] == 1
            await beside

    run(scenario)


def test_who_leaves_frees_the_turn() -> None:
    async def scenario() -> None:
        async with endpoint(max_running=1, max_tokens=240, **ORIGINAL) as (client, made, _):
            asked = asyncio.create_task(client.post(PATH, json={**BODY, "max_tokens": 240}))
            while not made._running:
                await asyncio.sleep(0.005)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            answer = await asyncio.wait_for(client.post("/v1/completions", json=BODY), 20)
            assert answer.status_code == 200 and made.turns._free == 1

    run(scenario)


def test_errors() -> None:
    async def scenario() -> None:
        async with endpoint(max_running=1, max_queue=0, **ORIGINAL) as (client, made, peer):
            for body, code in (
                ({**BODY, "stop": "x"}, "unknown_parameter"),
                ({**BODY, "stream": True}, "unknown_parameter"),
                ({**BODY, "temperature": 1}, "unknown_parameter"),
                ({**BODY, "prompt": ""}, "invalid_value"),
                ({**BODY, "max_tokens": 10**6}, "invalid_value"),
                ({"max_tokens": 5}, "invalid_value"),
                ([], "invalid_value"),
            ):
                answer = await client.post(PATH, json=body)
                assert answer.status_code == 400 and answer.json()["error"]["code"] == code, body
            await made.turns.take()
            assert (await client.post(PATH, json=BODY)).json()["error"]["code"] == "queue_full"
            made.turns.give_back()
            peer.there = False
            hook = plain_model()[0].register_forward_pre_hook(unreachable)
            try:
                assert (await client.post(PATH, json=BODY)).json()["error"]["code"] == "peer_away"
            finally:
                hook.remove()
            assert made.served.state == "away" and made.turns._free == 1
        async with endpoint(max_running=1) as (client, _, _):
            answer = await client.post(PATH, json=BODY)
            assert answer.status_code == 404 and "--compare MODEL_DIR" in answer.json()["error"]["message"]

    run(scenario)


def unreachable(*_: Any) -> None:
    raise WorkerUnreachable("at ipc:///secret")


def test_another_model_is_refused_at_the_start() -> None:
    async def scenario() -> None:
        with pytest.raises(BadInput, match="not the original"):
            async with endpoint(max_running=1, compare=tiny_folder("llama")):
                pass

    run(scenario)


def test_checked() -> None:
    assert checked_comparison(BODY) is BODY and checked_comparison(3) == 3
