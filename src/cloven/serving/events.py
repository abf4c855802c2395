"""A stream of events, as a handler writes it, with an end that OpenAI's clients know."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from cloven.serving.api_error import log_failure, of_exception
from cloven.serving.generation import FAILED, Generation

_FAILURE = f'data: {{"error": "{FAILED}"}}\n\n'  # transformers' form, which OpenAI's clients take for an error without a message


async def events(written: Any, generation: Generation, usage: bool = False) -> AsyncGenerator[str, None]:
    """The handler's pieces; then `[DONE]`, or the error that ended the generation.

    Args:
        written: the handler's async generator.
        generation: cancelled when the reader leaves.
        usage: the client has asked for a piece of its own about what the answer took, with no choices, as OpenAI's API has it.
    """
    try:
        async with contextlib.aclosing(written):
            async for piece in written:
                if generation.failure is not None and piece.endswith(_FAILURE):
                    log_failure(generation.failure)
                    yield piece.removesuffix(_FAILURE) + f"data: {json.dumps(of_exception(generation.failure).body())}\n\n"
                    return
                yield _with_usage(piece) if usage and '"usage":{' in piece else piece
        yield "data: [DONE]\n\n"
    finally:
        generation.cancel()


def _with_usage(piece: str) -> str:
    """transformers tells it with the end of the text: two events of that one."""
    *before, last, _ = piece.split("\n\n")
    try:
        end = json.loads(last.removeprefix("data: "))
        told = {**end, "choices": [], "usage": end.pop("usage")}
    except (ValueError, KeyError, AttributeError):
        return piece  # a text that only looks like it
    return "".join(f"{event}\n\n" for event in (*before, f"data: {json.dumps(end)}", f"data: {json.dumps(told)}"))
