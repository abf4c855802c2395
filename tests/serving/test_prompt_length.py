from __future__ import annotations

import threading
from typing import Any

import pytest

from cloven.serving.api_error import ApiError
from cloven.serving.prompt_length import _SHORT, require_fitting
from tests.served import plain_model, run

LONG = "thou art " * _SHORT


def body(text: str, kind: str) -> dict[str, Any]:
    if kind == "prompt":
        return {"prompt": text}
    content: Any = (
        text if kind == "text" else [{"type": "text", "text": text[: len(text) // 2]}, {"type": "text", "text": text[len(text) // 2 :]}]
    )
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant"}]}


@pytest.mark.parametrize("kind", ["prompt", "text", "parts"])
def test_what_cannot_fit_is_refused(kind: str) -> None:
    async def test() -> None:
        tokenizer = plain_model()[1]
        with pytest.raises(ApiError, match="the model takes 512") as caught:
            await require_fitting(tokenizer, body(LONG, kind), 512)
        assert caught.value.status == 400 and caught.value.code == "context_length_exceeded"
        tokens = len(tokenizer(LONG).input_ids)
        for context in (None, tokens, tokens + 1):
            await require_fitting(tokenizer, body(LONG, kind), context)
        await require_fitting(tokenizer, body("short", kind), 1)  # left to who makes the prompt

    run(test)


def test_others_go_on_meanwhile() -> None:
    threads = set[int]()

    class Tokenizer:
        _tokenizer: Any

        def encode(self, text: str, add_special_tokens: bool) -> str:
            threads.add(threading.get_ident())
            return text

    Tokenizer._tokenizer = Tokenizer()

    async def test() -> None:
        with pytest.raises(ApiError):
            await require_fitting(Tokenizer(), body(LONG, "prompt"), 512)
        assert threads and threading.get_ident() not in threads

    run(test)
