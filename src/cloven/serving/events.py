"""A stream of events, as a handler writes it, with an end that OpenAI's clients know."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from cloven.serving.api_error import log_failure, of_exception
from cloven.serving.generation import FAILED, Generation

_FAILURE = f'data: {{"error": "{FAILED}"}}\n\n'  # transformers' form, which OpenAI's clients take for an error without a message


async def events(written: Any, generation: Generation) -> AsyncGenerator[str, None]:
    """The handler's pieces; then `[DONE]`, or the error that ended the generation.

    Args:
        written: the handler's async generator.
        generation: cancelled when the reader leaves.
    """
    try:
        async with contextlib.aclosing(written):
            async for piece in written:
                if generation.failure is not None and piece.endswith(_FAILURE):
                    log_failure(generation.failure)
                    yield piece.removesuffix(_FAILURE) + f"data: {json.dumps(of_exception(generation.failure).body())}\n\n"
                    return
                yield piece
        yield "data: [DONE]\n\n"
    finally:
        generation.cancel()
