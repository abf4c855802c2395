"""Does sorting undo the keys?

Adversary: A3, who has the public model and a snapshot of layer 0's rows of v.
Method: the values of every head are sorted, in the cache and in the table of the public model's rows, and the nearest row is looked up:
    what is sorted is the same under any permutation. Rows that noise has made wider are thinned out to the table's width.
Success: the share of tokens recovered. Chance: the commonest token, always.
Weakened: mode none, a cache without keys.
Source: published for permuted hidden states (arXiv 2505.18332).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.guesses import every_token, nearest
from cloven.audit.kv_shield.subject import Subject


def by_sorting(rows: Tensor, table: Tensor) -> Tensor:
    """Guessed tokens [T] by the sorted values of every head; wider rows are thinned out to the table's width."""
    ordered = rows.sort(-1).values
    if rows.shape[2] != table.shape[2]:
        ordered = torch.nn.functional.interpolate(ordered, table.shape[2], mode="linear", align_corners=True)
    return nearest(ordered.flatten(1), table.sort(-1).values.flatten(1))


def sorting(subject: Subject) -> list[Attack]:
    """See the module."""
    return every_token(subject, "sorting", by_sorting)
