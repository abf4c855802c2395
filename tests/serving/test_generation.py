"""The small things of a generation; what it does with a model is in test_endpoint and test_batching."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.cli.serving.utils import _StreamError

from cloven.serving.api_error import ApiError, stopping
from cloven.serving.engine import Engine
from cloven.serving.generation import Generation, context_of, end_tokens
from cloven.serving.options import ServeOptions
from cloven.serving.order import completion_order
from cloven.serving.text import Text
from tests.served import NAME, generated, plain_model, run, served_model, text_of


def test_tokens_and_contexts() -> None:
    assert end_tokens(None) == [] and end_tokens(5) == [5] and end_tokens([5, 6]) == [5, 6]

    def context(**config: Any) -> int | None:
        return context_of(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))))

    assert context(max_position_embeddings=512) == 512
    assert context() is None and context(max_position_embeddings=None) is None and context(max_position_embeddings=0) is None


def test_without_a_batch_by_the_engine() -> None:
    """The turn is given back when the computation has ended, and once; a cancelled one ends early; one too long is not begun."""
    model, tokenizer = plain_model()

    async def scenario() -> None:
        served, _ = served_model()
        engine, ended = Engine(), list[str]()

        def made(name: str, **more: Any) -> Generation:
            order = completion_order({"prompt": "x", "temperature": 0, **more}, NAME, 10**6)
            return Generation(served, engine, None, order, ServeOptions(), lambda: ended.append(name))

        inputs = tokenizer("ROMEO:", return_tensors="pt")
        one = made("one", max_tokens=5)
        assert one.rate is None
        text, length, tokens = await one.generate_non_streaming(model, tokenizer, inputs, config(), "id")
        assert (text, length, tokens) == (text_of(generated("ROMEO:", 5)), 2, generated("ROMEO:", 5)) and ended == ["one"]
        rate = one.rate
        await asyncio.sleep(0.05)
        assert rate is not None and 1 < rate < 10**5 and one.rate == rate  # it does not go on after the end
        long = made("long", max_tokens=200)
        waiting = asyncio.create_task(long.generate_non_streaming(model, tokenizer, inputs, config(), "id"))
        await long.begun()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert long.started
        while ended != ["one", "long"]:
            await asyncio.sleep(0.01)
        too_long = made("too long", max_tokens=10**5)
        with pytest.raises(ApiError) as caught:
            await too_long.generate_non_streaming(model, tokenizer, inputs, config(), "id")
        assert caught.value.code == "context_length_exceeded" and not too_long.started
        pieces, _ = made("stream", max_tokens=3).generate_streaming(model, tokenizer, inputs, config(), "id")
        seen = [piece async for piece in drained(pieces)]
        assert "".join(seen) == text_of(generated("ROMEO:", 3))
        assert engine.stop(5)
        served.close()

    run(scenario)


def config() -> Any:
    return plain_model()[0].generation_config.__class__(do_sample=False, pad_token_id=0)


async def drained(pieces: asyncio.Queue[Any]) -> Any:
    while (piece := await pieces.get()) is not None:
        yield piece


@pytest.mark.parametrize("streamed", [True, False])
def test_whatever_is_wrong_with_the_text_the_turn_is_given_back(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = plain_model()

    def broken(self: Text) -> None:
        raise KeyError("with a prompt")

    monkeypatch.setattr(Text, "end", broken)

    async def scenario() -> None:
        served, _ = served_model()
        engine, ended = Engine(), list[str]()
        order = completion_order({"prompt": "x", "temperature": 0, "max_tokens": 3}, NAME, 10)
        made = Generation(served, engine, None, order, ServeOptions(), lambda: ended.append("one"))
        inputs = tokenizer("ROMEO:", return_tensors="pt")
        if streamed:
            pieces, _ = made.generate_streaming(model, tokenizer, inputs, config(), "id")
            await made._done
            told = [pieces.get_nowait() for _ in range(pieces.qsize())]
            assert isinstance(told[-1], _StreamError) and None not in told
        else:
            with pytest.raises(KeyError):
                await made.generate_non_streaming(model, tokenizer, inputs, config(), "id")
        assert ended == ["one"] and isinstance(made.failure, KeyError)
        assert engine.stop(5)
        served.close()

    run(scenario)


def test_an_end_with_an_error() -> None:
    """What there is of the text is no answer."""
    model, tokenizer = plain_model()

    async def scenario() -> None:
        served, _ = served_model()
        engine, ended = Engine(), list[str]()
        order = completion_order({"prompt": "x", "temperature": 0, "max_tokens": 400}, NAME, 400)
        made = Generation(served, engine, None, order, ServeOptions(), lambda: ended.append("one"))
        asked = asyncio.create_task(made.generate_non_streaming(model, tokenizer, tokenizer("ROMEO:", return_tensors="pt"), config(), "id"))
        await made.begun()
        made.end_with(stopping())
        with pytest.raises(ApiError, match="stopping"):
            await asked
        assert ended == ["one"] and made.length() < 400
        assert engine.stop(5)
        served.close()

    run(scenario)
