"""Do inner products with known tokens tell the next one?

Adversary: A3, who has the public model and a snapshot of layer 0's rows of v, and knows 15 tokens of every block of 16.
Method: inner products of rows are the same under any orthogonal key; the thief looks up the token whose inner products with the 15 known
    tokens, and with itself, are nearest to those in the cache.
Success: the share of last tokens of the blocks recovered. Chance: the commonest token of the text, always.
Weakened: mode none, a cache without keys.
Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.guesses import hits, in_every_mode
from cloven.audit.kv_shield.subject import Subject

BLOCK = 16


def by_gram(rows: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    """Guesses for the last token of each block of 16 whose other tokens are known, [blocks]: by inner products."""
    guesses = []
    for block, known in zip(rows.split(BLOCK), tokens.split(BLOCK), strict=True):
        if len(block) < BLOCK:
            break
        seen = torch.einsum("tgd,gd->tg", block, block[-1])  # with the 15 others, and with itself
        candidates = torch.einsum("tgd,ngd->ntg", table[known[:-1]], table)
        itself = table.pow(2).sum(-1)[:, None]
        guesses.append((torch.cat([candidates, itself], 1) - seen).abs().flatten(1).sum(1).argmin())
    return torch.stack(guesses)


def gram(subject: Subject) -> list[Attack]:
    """See the module."""
    tokens = subject.tokens
    last = tokens[BLOCK - 1 :: BLOCK]
    found = {mode: hits(by_gram(rows, subject.layer.table, tokens), last) for mode, rows in subject.caches.items()}
    metric = f"fraction of last tokens of a block of {BLOCK} recovered, the others known"
    return in_every_mode("gram", metric, found, subject.chance, len(last))
