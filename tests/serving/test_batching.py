"""The batch without HTTP: what the event loop's thread does, and the loop's end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from transformers import GenerationConfig

from cloven.errors import RunError, WorkerRefused
from cloven.serving import batching
from cloven.serving.api_error import ApiError
from cloven.serving.batching import Batch
from cloven.serving.sampling import Sampler
from cloven.serving.text import Text
from tests.served import generated, plain_model, run, served_model, text_of


class Asked:
    """One request of a batch, in the running event loop."""

    def __init__(self, batch: Batch, name: str, prompt: str = "ROMEO:", tokens: int = 8, **more: Any) -> None:
        tokenizer = plain_model()[1]
        loop = asyncio.get_running_loop()
        stops = more.pop("stops", ())
        self.text = Text(tokenizer, loop, None, ends=more.get("ends", ()), stops=stops, fixed_length=more.get("fixed", False))
        self.done: asyncio.Future[Exception | None] = loop.create_future()
        self.begun = 0
        settings: dict[str, Any] = {"ends": [], "sampler": None, "fixed": False, **more}
        batch.add(name, tokenizer(prompt).input_ids, self.text, tokens=tokens, first=self.count, ended=self.done.set_result, **settings)

    def count(self) -> None:
        self.begun += 1


def made(requests: int = 4, rows: int = 16, cached: int = 1024) -> tuple[Batch, Any]:
    served, _ = served_model()
    return Batch(served, requests, rows, cached), served


def test_many_are_each_their_own() -> None:
    async def scenario() -> None:
        batch, served = made()
        prompts = ["ROMEO:", "My lord,", "The king is a man of many words and few deeds, my lord, they say"]
        asked = [Asked(batch, f"r{number}", prompt, 6 + number) for number, prompt in enumerate(prompts)]
        assert [await one.done for one in asked] == [None, None, None]
        assert [one.text.tokens for one in asked] == [generated(prompt, 6 + number) for number, prompt in enumerate(prompts)]
        assert [one.begun for one in asked] == [6, 7, 8]
        assert not batch._requests and not batch._manager.output_router.result_handlers
        batch.stop()
        assert batch.join()
        served.close()

    run(scenario)


def test_ends_and_stops_and_samplers() -> None:
    tokens = generated("ROMEO:", 12)

    async def scenario() -> None:
        batch, served = made()
        hot = GenerationConfig(do_sample=True, temperature=2.0, top_k=0)
        asked = [
            Asked(batch, "end", tokens=12, ends=[tokens[5]]),
            Asked(batch, "fixed", tokens=12, ends=[tokens[5]], fixed=True),
            Asked(batch, "stop", tokens=12, stops=(text_of(tokens)[4:7],)),
            Asked(batch, "hot", tokens=12, sampler=Sampler(hot, 1)),
        ]
        assert [await one.done for one in asked] == [None] * 4
        first = tokens.index(tokens[5]) + 1
        assert asked[0].text.tokens == asked[1].text.tokens == tokens[:first]
        assert asked[0].begun == first and asked[1].begun == 12  # computed, and dropped
        assert asked[2].text.stopped and asked[2].text.tokens == tokens[: len(asked[2].text.tokens)]
        again = Asked(batch, "again", tokens=12, sampler=Sampler(hot, 1))
        await again.done
        assert again.text.tokens == asked[3].text.tokens != tokens
        assert not batch._manager.output_router.result_handlers  # a request that was ended early is forgotten, too
        batch.stop()
        assert batch.join()
        served.close()

    run(scenario)


def test_cancelling() -> None:
    async def scenario() -> None:
        batch, served = made()
        long = Asked(batch, "long", tokens=200)
        while not long.begun:
            await asyncio.sleep(0.005)
        batch.cancel("long")
        batch.cancel("long")
        batch.cancel("nobody")
        assert await long.done is None and len(long.text.tokens) < 200
        short = Asked(batch, "short")
        await short.done
        assert short.text.tokens == generated("ROMEO:", 8) and not batch._manager.output_router.result_handlers
        batch.stop()
        assert batch.join()
        served.close()

    run(scenario)


def failing(error: Exception, after: int = 1) -> Any:
    left = [after]

    def fail(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    return plain_model()[0].register_forward_pre_hook(fail)


def test_after_an_error_another_loop() -> None:
    async def scenario() -> None:
        batch, served = made()
        error, first = WorkerRefused("no"), batch._manager
        with failing(error, 3):
            asked = [Asked(batch, f"r{number}") for number in range(3)]
            assert {await one.done for one in asked} == {error}
        while first.is_running():
            await asyncio.sleep(0.005)
        again = Asked(batch, "again")
        assert await again.done is None and again.text.tokens == generated("ROMEO:", 8)
        assert batch._manager is not first and first.batch_processor is None
        assert sum(thread.name == "cloven-batch" for thread in threading.enumerate()) == 1
        batch.stop()
        assert batch.join()
        served.close()

    run(scenario)


def test_a_request_that_a_dying_loop_never_saw_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put into the queue after the loop has emptied it for the last time."""
    monkeypatch.setattr(batching, "_LOOK_SECONDS", 0.05)

    async def scenario() -> None:
        batch, served = made()
        manager = batch._manager
        manager.stop(block=True, timeout=5, hard_stop=True)
        monkeypatch.setattr(manager, "is_running", lambda: True)
        manager.background_thread_status.clear()  # as it was a moment ago: requests are still taken
        lost = Asked(batch, "lost")
        monkeypatch.undo()
        error = await lost.done
        assert isinstance(error, ApiError) and error.status == 503
        served.close()

    run(scenario)


def test_stopping() -> None:
    async def scenario() -> None:
        batch, served = made()
        asked = [Asked(batch, f"r{number}", tokens=200) for number in range(6)]
        await asyncio.sleep(0.05)
        batch.stop()
        errors = [await one.done for one in asked]
        assert all(isinstance(error, ApiError) and error.code == "stopping" for error in errors)
        with pytest.raises(ApiError):
            Asked(batch, "late")
        assert await asyncio.to_thread(batch.join)
        served.close()

    run(scenario)


def test_a_model_that_cannot_be_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    served, _ = served_model()
    monkeypatch.setattr(served.model.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(RunError, match="cannot be batched"):
        Batch(served, 4, 16, 1024)
    monkeypatch.undo()
    monkeypatch.setattr(batching._Manager, "_create_batch_processor", lambda _: 1 / 0)
    with pytest.raises(RunError, match="does not start: ZeroDivisionError"):
        Batch(served, 4, 16, 1024)
    served.close()


def test_the_memory_is_bounded_by_what_was_said() -> None:
    batch, served = made(requests=3, rows=16, cached=100)
    config = batch._manager.continuous_batching_config
    assert config.num_blocks * config.page_size == 112 and config.max_batch_tokens == 16 and config.max_requests_per_batch == 3
    assert not config.allow_block_sharing and not config.return_logprobs
    batch._stopped = True
    assert batch.join()
    served.close()
