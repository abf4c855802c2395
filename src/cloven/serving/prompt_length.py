"""Whether a long text can fit the model at all, found out piece by piece: transformers' handlers tokenize all of it at once, in the one
thread that all requests share, and a million characters take a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from cloven.serving.api_error import bad_request

_PIECE = 2**12  # characters
_MERGED = 16  # tokens that a piece might have less, or its neighbours, if it were not cut


async def require_fitting(tokenizer: Any, body: dict[str, Any], context: int | None) -> None:
    """Refuse what is longer than the model's context, before a handler looks at it. What is hardly longer, the handler refuses.

    Args:
        tokenizer: of transformers.
        body: of an order.
        context: tokens that the model was made for; None: as many as one likes.

    Raises:
        ApiError: 400, context_length_exceeded.
    """
    if context is None:
        return
    tokens = 0
    for text in _texts(body):
        for start in range(0, len(text), _PIECE) if len(text) > _PIECE else ():
            found = tokenizer._tokenizer.encode(text[start : start + _PIECE], add_special_tokens=False)
            tokens += max(0, len(found) - _MERGED)
            if tokens > context:
                raise bad_request(f"the prompt is too long: the model takes {context} tokens with the answer", "context_length_exceeded")
            await asyncio.sleep(0)  # others go on


def _texts(body: dict[str, Any]) -> Iterator[str]:
    if "prompt" in body:
        yield body["prompt"]
    for message in body.get("messages", ()):
        content = message.get("content")
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content or ())
