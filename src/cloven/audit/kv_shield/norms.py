"""Do the lengths of the rows tell the tokens?

Adversary: A3, who has the public model and a snapshot of layer 0's rows of v.
Method: the norms of the kv heads are the same under any permutation and any rotation; the thief looks up the token whose norms are nearest.
Success: the share of tokens recovered. Chance: the commonest token, always.
Weakened: mode none, a cache without keys.
Source: ours.
"""

from __future__ import annotations

from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.guesses import every_token, nearest
from cloven.audit.kv_shield.subject import Subject


def by_norms(rows: Tensor, table: Tensor) -> Tensor:
    """Guessed tokens [T] by the norms of the heads."""
    return nearest(rows.norm(dim=-1), table.norm(dim=-1))


def norms(subject: Subject) -> list[Attack]:
    """See the module."""
    return every_token(subject, "norms", by_norms)
