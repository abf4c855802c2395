from __future__ import annotations

from typing import Any

import pytest
import torch

from cloven.audit.windows import characters_needed, windows_of
from cloven.errors import BadInput
from cloven.zoo.text import PROMPTS
from tests.split_models import demo_tokenizer

TEXT = "\n".join(PROMPTS)


class WithBos:
    """A tokenizer of one token per character that begins every text with its BOS token."""

    bos_token_id = 7

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [100 + ord(letter) for letter in text]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


@pytest.mark.parametrize("context", [2, 10, 33, 512])
def test_windows_are_the_text_in_order(context: int) -> None:
    ids = demo_tokenizer()(TEXT)["input_ids"]
    windows = windows_of(TEXT, demo_tokenizer(), 4096, context)
    assert all(len(window) == context for window in windows[:-1]) and 2 <= len(windows[-1]) <= context
    joined = torch.cat(windows).tolist()
    assert joined == ids[: len(joined)] and len(ids) - len(joined) <= 1  # a single last token predicts nothing


@pytest.mark.parametrize("tokens", [2, 10, 11, 20, 57])
def test_no_more_tokens_than_asked_for(tokens: int) -> None:
    windows = windows_of(TEXT, demo_tokenizer(), tokens, 10)
    count = sum(len(window) for window in windows)
    assert count == tokens - (tokens % 10 == 1)


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    windows = windows_of("abcdefgh", WithBos(), 100, 4)
    letters = ["".join(chr(token - 100) for token in window[1:].tolist()) for window in windows]
    assert letters == ["abc", "def", "gh"] and {int(window[0]) for window in windows} == {7}
    assert [len(window) for window in windows_of("abcdefgh", WithBos(), 6, 4)] == [4, 2]


def test_only_the_beginning_of_a_long_text_is_looked_at() -> None:
    assert characters_needed(10) == 320 and characters_needed(-1) == 0
    windows = windows_of("word " * 64 + "\x00" * 10**6, demo_tokenizer(), 10, 10)
    assert sum(len(window) for window in windows) == 10


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_empty_texts(text: str) -> None:
    with pytest.raises(BadInput, match="the text is empty"):
        windows_of(text, demo_tokenizer(), 100, 10)


def test_a_single_token() -> None:
    for text, tokenizer in (("a", demo_tokenizer()), ("", WithBos())):
        with pytest.raises(BadInput, match=r"fewer than 2 tokens|the text is empty"):
            windows_of(text, tokenizer, 100, 10)
    assert len(windows_of("a", WithBos(), 100, 10)[0]) == 2
