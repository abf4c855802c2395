from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cloven.serving.api_error import ApiError
from cloven.serving.prompt_length import _PIECE, require_fitting
from tests.served import plain_model, run

LONG = "thou art " * 4000


def body(text: str, kind: str) -> dict[str, Any]:
    if kind == "prompt":
        return {"prompt": text}
    halves = text[: len(text) // 2], text[len(text) // 2 :]
    content: Any = text if kind == "text" else [{"type": "text", "text": half} for half in halves]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant"}]}


@pytest.mark.parametrize("kind", ["prompt", "text", "parts"])
def test_what_cannot_fit_is_refused_and_what_fits_is_not(kind: str) -> None:
    async def test() -> None:
        tokenizer = plain_model()[1]
        tokens = len(tokenizer(LONG).input_ids)
        for context in (512, tokens * 9 // 10):
            with pytest.raises(ApiError, match=f"the model takes {context}") as caught:
                await require_fitting(tokenizer, body(LONG, kind), context)
            assert caught.value.status == 400 and caught.value.code == "context_length_exceeded"
        for context_or_none in (None, tokens):
            await require_fitting(tokenizer, body(LONG, kind), context_or_none)
        await require_fitting(tokenizer, body("short", kind), 1)  # left to who makes the prompt

    run(test)


@pytest.mark.parametrize("text", [" ", "a", "\u0301", "😀", "ab\n"])
def test_no_text_that_fits_is_refused(text: str) -> None:
    """However strange: cutting it must not make it longer than it is allowed to be."""

    async def test() -> None:
        tokenizer = plain_model()[1]
        for count in (_PIECE // len(text), 3 * _PIECE):
            tokens = len(tokenizer(text * count).input_ids)
            await require_fitting(tokenizer, body(text * count, "prompt"), tokens)

    run(test)


def test_others_go_on_meanwhile_and_no_more_is_read_than_is_needed() -> None:
    seen = list[int]()

    class Tokenizer:
        _tokenizer: Any

        def encode(self, text: str, add_special_tokens: bool) -> str:
            seen.append(len(text))
            return text

    Tokenizer._tokenizer = Tokenizer()

    async def test() -> None:
        turns = list[int]()

        async def other() -> None:
            while True:
                turns.append(len(seen))
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        with pytest.raises(ApiError):
            await require_fitting(Tokenizer(), body("x" * 100 * _PIECE, "prompt"), 10 * _PIECE)
        beside.cancel()
        assert seen == [_PIECE] * 11 and set(range(1, 11)) <= set(turns)

    run(test)
