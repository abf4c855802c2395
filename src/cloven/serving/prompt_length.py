"""Whether a long text can fit the model at all, found out in a thread: transformers' handlers tokenize where all requests share one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from cloven.serving.api_error import bad_request

_SHORT = 2**14  # characters that are tokenized in some milliseconds, wherever that is
_MERGED = 2  # tokens of a message that its neighbours could save


async def require_fitting(tokenizer: Any, body: dict[str, Any], context: int | None) -> None:
    """Refuse what is longer than the model's context, before a handler looks at it.

    Args:
        tokenizer: of transformers.
        body: of an order.
        context: tokens that the model was made for; None: as many as one likes.

    Raises:
        ApiError: 400, context_length_exceeded.
    """
    texts = list(_texts(body))
    if context is None or sum(map(len, texts)) <= _SHORT:
        return
    tokens = await asyncio.to_thread(_tokens, tokenizer, texts)
    if tokens - _MERGED * len(texts) > context:
        raise bad_request(f"{tokens} tokens: the model takes {context} together with the answer", "context_length_exceeded")


def _tokens(tokenizer: Any, texts: list[str]) -> int:
    return sum(len(tokenizer._tokenizer.encode(text, add_special_tokens=False)) for text in texts)


def _texts(body: dict[str, Any]) -> Iterator[str]:
    if "prompt" in body:
        yield body["prompt"]
    for message in body.get("messages", ()):
        content = message.get("content")
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content or ())
