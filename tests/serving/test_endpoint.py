"""The application over an unsplit model: what is its own, and not the client's or the protocol's (those are in end_to_end)."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from cloven.errors import BudgetExhausted, VerificationFailed, WorkerRefused, WorkerUnreachable
from cloven.serving import endpoint as endpoint_module
from cloven.serving.api_keys import ApiKeys
from tests.served import NAME, endpoint, generated, plain_model, run, served_model, text_of

PATH = "/v1/completions"
RUNNING = [1, 4]


def body(**more: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": "ROMEO:", "max_tokens": 8, "temperature": 0, **more}


def pieces_of(text: str) -> tuple[str, list[Any]]:
    """The joined text of a stream, and its events."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    events = [json.loads(line) if line != "[DONE]" else line for line in lines]
    return "".join(event["choices"][0].get("text", "") for event in events if isinstance(event, dict) and event.get("choices")), events


@pytest.mark.parametrize("running", RUNNING)
def test_texts_are_those_of_generate(running: int) -> None:
    async def scenario() -> None:
        async with endpoint(max_running=running) as (client, _, _):
            for prompt in ("ROMEO:", "My lord,"):
                expected = text_of(generated(prompt, 8))
                answer = (await client.post(PATH, json=body(prompt=prompt))).json()
                assert answer["choices"][0]["text"] == expected and answer["model"] == NAME
                stream = await client.post(PATH, json=body(prompt=prompt, stream=True))
                text, events = pieces_of(stream.text)
                assert text == expected and events[-1] == "[DONE]" and stream.headers["content-type"].startswith("text/event-stream")
                assert events[-2]["choices"][0]["finish_reason"] == "length"
                asked = body(prompt=prompt, stream=True, stream_options={"include_usage": True})
                *_, end, used, done = pieces_of((await client.post(PATH, json=asked)).text)[1]
                assert end["choices"][0]["finish_reason"] == "length" and "usage" not in end and done == "[DONE]"
                assert used["choices"] == [] and used["usage"]["completion_tokens"] == 8

    run(scenario)


def passes(counted: list[int]) -> Any:
    """Counts the passes of the model."""

    def count(*_: Any) -> None:
        counted.append(1)

    return plain_model()[0].register_forward_pre_hook(count)


@pytest.mark.parametrize("running", RUNNING)
def test_a_fixed_length_computes_all_and_gives_the_same(running: int) -> None:
    """An end token, a stop string or neither: as many passes as for max_tokens, and the text of a server that does not pad."""
    model, _ = plain_model()
    tokens = generated("ROMEO:", 20)
    end, stop = tokens[6], text_of(tokens)[5:8]

    async def ask(fixed: bool, **more: Any) -> tuple[Any, int]:
        counted: list[int] = []
        async with endpoint(max_running=running, fixed_length=fixed) as (client, _, _):
            with passes(counted):
                answer = (await client.post(PATH, json=body(max_tokens=20, **more))).json()
            stream, _ = pieces_of((await client.post(PATH, json=body(max_tokens=20, stream=True, **more))).text)
        assert stream == answer["choices"][0]["text"]
        return answer, len(counted)

    async def scenario() -> None:
        whole, _ = await ask(False)
        by_stop, few = await ask(False, stop=stop)
        by_stop_fixed, all_of_them = await ask(True, stop=stop)
        assert by_stop_fixed["choices"] == by_stop["choices"] and few < 20 <= all_of_them <= 21
        assert whole["choices"][0]["text"].startswith(by_stop["choices"][0]["text"])
        kept = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = end
        try:
            by_end, fewer = await ask(False)
            by_end_fixed, all_again = await ask(True)
        finally:
            model.generation_config.eos_token_id = kept
        assert by_end_fixed["choices"] == by_end["choices"] and fewer < 20 <= all_again == all_of_them
        assert by_end["usage"] == by_end_fixed["usage"] and by_end["usage"]["completion_tokens"] == tokens.index(end) + 1
        assert by_end["choices"][0]["finish_reason"] == "stop"

    run(scenario)


def test_requests_at_once_share_passes() -> None:
    """Four at once take hardly more passes of the model than one; one after the other four times as many."""

    async def ask(running: int) -> int:
        counted: list[int] = []
        async with endpoint(max_running=running) as (client, _, _):
            with passes(counted):
                hot = [
                    body(max_tokens=16),
                    body(max_tokens=16, temperature=1),
                    body(max_tokens=16, stream=True),
                    body(max_tokens=16, top_p=0.5),
                ]
                answers = await asyncio.gather(*(client.post(PATH, json=one) for one in hot))
        assert {answer.status_code for answer in answers} == {200}
        return len(counted)

    async def scenario() -> None:
        assert await ask(1) >= 4 * 15
        assert 15 <= await ask(4) <= 24

    run(scenario)


def test_a_request_that_cannot_be_batched_goes_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Too long for the common cache, or with a setting that the batch would drop: the text is still generate's, and beside others."""
    model, _ = plain_model()

    async def scenario() -> None:
        async with endpoint(max_running=4, cache_tokens=32) as (client, made, _):
            assert made._batch is not None
            both = await asyncio.gather(client.post(PATH, json=body(max_tokens=60)), client.post(PATH, json=body(max_tokens=8)))
            assert [answer.json()["choices"][0]["text"] for answer in both] == [text_of(generated("ROMEO:", n)) for n in (60, 8)]
            plain = text_of(generated("ROMEO:", 20))
            for name, value in (("repetition_penalty", 1.5), ("no_repeat_ngram_size", 1)):
                setattr(model.generation_config, name, value)
                try:
                    expected = text_of(generated("ROMEO:", 20))
                    answer = await client.post(PATH, json=body(max_tokens=20))
                finally:
                    setattr(model.generation_config, name, None)
                assert answer.json()["choices"][0]["text"] == expected != plain, name

    with caplog.at_level(logging.INFO, "cloven"):
        run(scenario)
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records if "computed alone" in record.getMessage()] == [
        "length",
        "no_repeat_ngram_size",
    ]


def test_who_goes_alone_holds_nobody_up() -> None:
    """They take turns by passes of the model: a batch's short answers come before a long one ends, and both are right."""

    async def scenario() -> None:
        async with endpoint(max_running=4, cache_tokens=32, max_tokens=240) as (client, _, _):
            long = asyncio.create_task(client.post(PATH, json=body(max_tokens=200)))
            await asyncio.sleep(0.2)
            short = await asyncio.gather(*(client.post(PATH, json=body()) for _ in range(3)))
            assert not long.done()
            assert {answer.json()["choices"][0]["text"] for answer in short} == {text_of(generated("ROMEO:", 8))}
            assert (await long).json()["choices"][0]["text"] == text_of(generated("ROMEO:", 200))

    run(scenario)


def test_more_than_the_cache_holds_at_once() -> None:
    """Six requests of 40 tokens in a cache of 96: transformers puts some off and begins them anew; the texts are the same."""

    async def scenario() -> None:
        async with endpoint(max_running=6, cache_tokens=96) as (client, _, _):
            prompts = ["ROMEO:", "My lord,", "The king is", "What say you", "JULIET: O", "To be or not"]
            answers = await asyncio.gather(*(client.post(PATH, json=body(prompt=prompt, max_tokens=40)) for prompt in prompts))
            assert [answer.json()["choices"][0]["text"] for answer in answers] == [text_of(generated(prompt, 40)) for prompt in prompts]

    run(scenario)


def failing_at(error: Exception, after: int) -> Any:
    """The model's pass number `after` raises."""
    left = [after]

    def fail(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    return plain_model()[0].register_forward_pre_hook(fail)


@pytest.mark.parametrize("running", RUNNING)
@pytest.mark.parametrize(
    ("error", "status", "code", "state"),
    [
        (WorkerUnreachable("at ipc:///secret"), 503, "peer_away", "away"),
        (VerificationFailed("layer 3"), 502, "verification_failed", "ended"),
        (WorkerRefused("no"), 502, "peer_failed", "ready"),
        (BudgetExhausted("no"), 429, "insufficient_quota", "ready"),
        (ZeroDivisionError("Xylophone"), 500, "internal_error", "ready"),
    ],
)
def test_errors(running: int, error: Exception, status: int, code: str, state: str, caplog: pytest.LogCaptureFixture) -> None:
    """Before the first token a status, even of a stream; later an event. And the next request is computed, where nothing forbids it."""

    async def scenario() -> None:
        for stream, after in ((False, 1), (False, 4), (True, 1), (True, 4)):
            async with endpoint(max_running=running) as (client, made, peer):
                peer.there = False
                with failing_at(error, after):
                    answer = await client.post(PATH, json=body(stream=stream))
                if stream and after > 1:
                    text, events = pieces_of(answer.text)
                    assert answer.status_code == 200 and text_of(generated("ROMEO:", 8)).startswith(text) and text
                    told = events[-1]["error"]
                else:
                    assert answer.status_code == status
                    told = answer.json()["error"]
                assert told["code"] == code and "secret" not in told["message"] and "Xylophone" not in told["message"]
                assert made.served.state == state and made.turns.waiting == 0
                health = await client.get("/health")
                assert health.status_code == (200 if state == "ready" else 503)
                again = await client.post(PATH, json=body())
                assert again.status_code == (200 if state == "ready" else 503)
                if state == "ready":
                    assert again.json()["choices"][0]["text"] == text_of(generated("ROMEO:", 8))

    run(scenario)
    assert "Xylophone" not in caplog.text


def test_one_bad_pass_fails_all_that_were_in_it_and_nobody_else() -> None:
    async def scenario() -> None:
        async with endpoint(max_running=4, max_queue=8) as (client, _, _):
            with failing_at(WorkerRefused("no"), 6):
                answers = await asyncio.gather(*(client.post(PATH, json=body(max_tokens=20)) for _ in range(8)))
            codes = [answer.status_code for answer in answers]
            assert 1 <= codes.count(502) <= 4 and codes.count(502) + codes.count(200) == 8
            right = text_of(generated("ROMEO:", 20))
            assert all(answer.json()["choices"][0]["text"] == right for answer in answers if answer.status_code == 200)

    run(scenario)


@pytest.mark.parametrize("running", RUNNING)
def test_who_leaves_frees_the_turn(running: int) -> None:
    """Reading the stream, waiting for the answer, or waiting for a turn."""

    async def scenario() -> None:
        async with endpoint(max_running=running, max_tokens=240) as (client, made, _):
            long = body(max_tokens=240)
            for stream in (False, True):
                asked = [asyncio.create_task(client.post(PATH, json={**long, "stream": stream})) for _ in range(running + 2)]
                while made.turns.waiting < 2:
                    await asyncio.sleep(0.01)
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
                answer = await asyncio.wait_for(client.post(PATH, json=body()), 20)
                assert answer.json()["choices"][0]["text"] == text_of(generated("ROMEO:", 8))
                while made._running:
                    await asyncio.sleep(0.01)
                assert made.turns._free == running and made.turns.waiting == 0

    run(scenario)


def test_chat_templates() -> None:
    tokenizer = plain_model()[1]
    chat: Any = {"messages": [{"role": "user", "content": "ROMEO:"}], "max_tokens": 8, "temperature": 0}

    async def scenario() -> None:
        async with endpoint(max_running=4) as (client, _, _):
            answer = await client.post("/v1/chat/completions", json=chat)
            assert answer.json()["choices"][0]["message"]["content"] == text_of(generated("ROMEO:", 8))
            refused = await client.post("/v1/chat/completions", json={**chat, "messages": [{"role": "user", "content": "refuse"}]})
            assert refused.status_code == 400 and refused.json()["error"]["code"] == "template_refused" and "Xyl" not in refused.text
            kept, tokenizer.chat_template = tokenizer.chat_template, None
            try:
                none = await client.post("/v1/chat/completions", json=chat)
            finally:
                tokenizer.chat_template = kept
            assert none.status_code == 400 and none.json()["error"]["code"] == "no_chat_template"

    run(scenario)


def test_routes_and_keys() -> None:
    key = "one-0123456789abcdefghij"

    async def scenario() -> None:
        async with endpoint(ApiKeys([key]), max_running=1) as (client, _, _):
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/v1/models")).status_code == 401
            known = {"authorization": f"Bearer {key}"}
            models = (await client.get("/v1/models", headers=known)).json()
            assert [model["id"] for model in models["data"]] == [NAME] and models["data"][0]["object"] == "model"
            assert (await client.get(f"/v1/models/{NAME}", headers=known)).json() == models["data"][0]
            for path in ("/v1/models/a/b", "/reset", "/load_model", "/metrics", "http://localhost//health"):
                answer = await client.get(path, headers=known)
                assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"
            assert (await client.get(PATH, headers=known)).json()["error"]["code"] == "method_not_allowed"

    run(scenario)


def test_when_it_stops_everybody_gets_an_end() -> None:
    async def scenario() -> None:
        asked: list[asyncio.Task[Any]] = []
        for running in RUNNING:
            async with endpoint(max_running=running, max_tokens=240) as (client, made, _):
                asked = [asyncio.create_task(client.post(PATH, json=body(max_tokens=240))) for _ in range(running + 2)]
                while made.turns.waiting < 2:
                    await asyncio.sleep(0.01)
                stopping = asyncio.create_task(made._stop())
                answers = await asyncio.wait_for(asyncio.gather(*asked), 20)
                await stopping
                assert {answer.status_code for answer in answers} <= {200, 503}
                assert sum(answer.status_code == 503 for answer in answers) >= 2
                for answer in answers:  # a text is whole, or none
                    told = answer.json()
                    assert told["usage"]["completion_tokens"] == 240 if answer.status_code == 200 else told["error"]["code"] == "stopping"
                assert made.served.session.closed
                assert (await client.post(PATH, json=body())).json()["error"]["code"] == "stopping"

    run(scenario)


def test_one_after_the_other_where_a_cache_is_one_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    served, _ = served_model(batches=False)
    try:
        assert endpoint_module._batch_of(served, endpoint_module.ServeOptions()) is None
        assert served.batches is False
    finally:
        served.close()
    able, _ = served_model()
    try:
        assert endpoint_module._batch_of(able, endpoint_module.ServeOptions(max_running=1)) is None
        monkeypatch.setattr(able.model.config, "_attn_implementation_internal", "flex_attention")
        assert endpoint_module._batch_of(able, endpoint_module.ServeOptions()) is None  # and says so, instead of not starting
    finally:
        able.close()
