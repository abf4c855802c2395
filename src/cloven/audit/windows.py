"""A text in windows of tokens, for measurements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cloven.errors import BadInput

DEFAULT_TOKENS = 4096
DEFAULT_CONTEXT = 512
CHARACTERS_PER_TOKEN = 32


def characters_needed(tokens: int) -> int:
    """How much of a text is looked at: no tokenizer's average token is longer."""
    return CHARACTERS_PER_TOKEN * max(tokens, 0)


def windows_of(text: str, tokenizer: Any, tokens: int, context: int) -> list[Tensor]:
    """Cut a text.

    Args:
        text: its first `characters_needed(tokens)` characters are looked at.
        tokenizer: of the model. If it begins a text with its BOS token, every window begins with it.
        tokens: how many at most, over all windows.
        context: tokens of a window; the last window may be shorter.

    Returns:
        Token ids, int64 [≤ context] each, at least 2.

    Raises:
        BadInput: fewer than 2 tokens.
    """
    text = text[: characters_needed(tokens)]
    if not text.strip():
        raise BadInput("the text is empty")
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] == [bos]:
        start, ids = [bos], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        start = []
    windows: list[Tensor] = []
    step = context - len(start)
    for first in range(0, len(ids), step):
        left = tokens - sum(map(len, windows))
        window = torch.tensor([*start, *ids[first : first + step]][:left], dtype=torch.int64)
        if len(window) < 2:
            break
        windows.append(window)
    if not windows:
        raise BadInput("the text has fewer than 2 tokens: there is nothing to predict")
    return windows
