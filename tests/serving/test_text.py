from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS, ReasoningText, ToolCall
from transformers.utils.chat_parsing import ResponseParser

from cloven.serving.api_error import ApiError
from cloven.serving.text import Text, TextEnded
from tests.served import generated, plain_model, text_of


class Loop:
    """An event loop that does at once what it is given."""

    def call_soon_threadsafe(self, act: Any, *arguments: Any) -> None:
        act(*arguments)


def made(pieces: asyncio.Queue[Any] | None, **options: Any) -> Text:
    loop: Any = Loop()
    text = Text(plain_model()[1], loop, pieces, **options)
    text.put(torch.tensor([[1, 2, 3]]))  # the prompt
    return text


def all_of(pieces: asyncio.Queue[Any]) -> list[Any]:
    found = []
    while not pieces.empty():
        found.append(pieces.get_nowait())
    return found


TOKENS = generated("ROMEO:", 24)


def test_the_text_in_pieces() -> None:
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    text = made(pieces)
    for token in TOKENS:
        text.put(torch.tensor([token]))
    text.end()
    text.end()
    written = all_of(pieces)
    assert written.pop() is None and None not in written
    assert "".join(written) == text_of(TOKENS)
    assert text.tokens == TOKENS and text.total_tokens == 24 and not text.over and not text.stopped


def test_an_end_token() -> None:
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    text = made(pieces, ends=[TOKENS[2], 5000])
    text.put(torch.tensor([TOKENS[0]]))
    text.put(torch.tensor([TOKENS[1]]))
    with pytest.raises(TextEnded):
        text.put(torch.tensor([TOKENS[2]]))
    assert text.over and not text.stopped and text.tokens == TOKENS[:3]


def test_a_stop_string() -> None:
    whole = text_of(TOKENS)
    stop = whole[10:14]
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    text = made(pieces, stops=[stop])
    with pytest.raises(TextEnded):
        for token in TOKENS:
            text.put(torch.tensor([token]))
    text.end()
    assert text.stopped and text.over and len(text.tokens) < len(TOKENS)
    assert "".join(all_of(pieces)[:-1]) == whole[: whole.index(stop)]


def test_a_fixed_length_goes_on_and_drops() -> None:
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    text = made(pieces, ends=[TOKENS[4]], fixed_length=True)
    for token in TOKENS:
        text.put(torch.tensor([token]))
    text.end()
    first = TOKENS.index(TOKENS[4]) + 1
    assert text.tokens == TOKENS[:first] and text.total_tokens == first and text.over
    assert "".join(all_of(pieces)[:-1]) == text_of(TOKENS[:first])


def test_who_has_left() -> None:
    for fixed in (False, True):
        text = made(None, fixed_length=fixed)
        text.cancel()
        with pytest.raises(TextEnded):
            text.put(torch.tensor([TOKENS[0]]))
        assert text.tokens == [] and text.cancelled


@pytest.mark.parametrize("stops", [(), ("never there",)])
def test_tool_calls_and_reasoning_by_transformers_parser(stops: tuple[str, ...]) -> None:
    """As for a Qwen; stop strings, which hold text back, take nothing from it."""
    written = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Verona"}}\n</tool_call>'
    template = next(kept for types, kept in _RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3" in types)
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    text = made(pieces, stops=stops, parser=ResponseParser(template, prefix="<|im_start|>assistant\n", tools=None))
    for token in plain_model()[1](written).input_ids:
        text.put(torch.tensor([token]))
    text.end()
    found = all_of(pieces)
    assert found.pop() is None
    (call,) = [item for item in found if isinstance(item, ToolCall)]
    assert call.name == "weather" and json.loads(call.arguments) == {"city": "Verona"}
    assert "".join(item for item in found if isinstance(item, ReasoningText)).strip() == "hm"


def test_without_a_queue_the_tokens_are_kept() -> None:
    text = made(None)
    text.put(torch.tensor(TOKENS))
    text.end()
    assert text.tokens == TOKENS


BROKEN = ("<tool_call>\n{}\n</tool_call>", "<tool_call>\n[1]\n</tool_call>", "<tool_call>\n{}")


@pytest.mark.parametrize("written", BROKEN)
def test_a_tool_call_that_nobody_can_read(written: str) -> None:
    """The model wrote it: an error of the answer's own, whenever it shows."""
    template = next(kept for types, kept in _RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3" in types)
    text = made(asyncio.Queue(), parser=ResponseParser(template, prefix="<|im_start|>assistant\n", tools=None))

    def all_of_it() -> None:
        for token in plain_model()[1](written).input_ids:
            text.put(torch.tensor([token]))
        text.end()

    with pytest.raises(ApiError) as caught:
        all_of_it()
    assert caught.value.code == "unreadable_tool_call"


def test_a_tool_call_that_is_cut_off_is_dropped() -> None:
    template = next(kept for types, kept in _RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3" in types)
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    text = made(pieces, parser=ResponseParser(template, prefix="<|im_start|>assistant\n", tools=None))
    for token in plain_model()[1]('<tool_call>\n{"name": "wea').input_ids:
        text.put(torch.tensor([token]))
    text.end()
    assert all_of(pieces)[-1] is None
