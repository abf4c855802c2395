"""Can the tokens be looked up by their rows?

Adversary: A3, who has the public model and a snapshot of layer 0's rows of v.
Method: in layer 0, v is a function of the token alone. The thief computes it for the whole vocabulary, and takes every row of the cache for
    the token whose row is nearest by L1.
Success: the share of tokens recovered. Chance: the commonest token, always.
Weakened: mode none, a cache without keys.
Source: ours.
"""

from __future__ import annotations

from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.guesses import every_token, nearest
from cloven.audit.kv_shield.subject import Subject


def by_table(rows: Tensor, known: Tensor) -> Tensor:
    """Guessed tokens [T] from rows [T, G, D], by the nearest row of the public model's table [N, G, d]."""
    return nearest(rows[..., : known.shape[2]].flatten(1), known.flatten(1))


def table(subject: Subject) -> list[Attack]:
    """See the module."""
    return every_token(subject, "table", by_table)
