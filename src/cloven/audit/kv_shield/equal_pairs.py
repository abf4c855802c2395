"""Does the cache show which places hold the same token?

Adversary: A3, who has a snapshot of layer 0's rows of v, and needs no model.
Method: the projector on the columns of the keyed rows V' does not depend on the key. Under it, places i and j are near each other when
    their rows differ by noise only. As many closest pairs are chosen as there are pairs of equal tokens.
Success: the share of the chosen pairs that hold equal tokens. Chance: the share of such pairs among all.
Weakened: mode none, a cache without keys.
Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.guesses import in_every_mode
from cloven.audit.kv_shield.subject import Subject


def column_spaces(rows: Tensor) -> list[Tensor]:
    """An orthonormal basis of the columns of every head's rows [T, G, D]."""
    return [torch.linalg.qr(rows[:, head].double())[0] for head in range(rows.shape[1])]


def pairs_found(spaces: list[Tensor], tokens: Tensor) -> float:
    """Share of the pairs of equal tokens among as many closest pairs, by orthonormal bases [T, r] of column spaces."""
    distance = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for basis in spaces:
        p = basis @ basis.t()
        distance += p.diagonal()[:, None] + p.diagonal()[None] - 2 * p
    i, j = torch.triu_indices(len(tokens), len(tokens), 1)
    same = tokens[i] == tokens[j]
    count = int(same.sum())
    return float(same[distance[i, j].argsort()[:count]].double().mean()) if count else 0.0


def pairs_in_every_mode(name: str, metric: str, spaces: dict[str, list[Tensor]], tokens: Tensor) -> list[Attack]:
    """What column spaces by mode show of a text [T]; tries are the pairs of equal tokens, which the value is a fraction of."""
    i, j = torch.triu_indices(len(tokens), len(tokens), 1)
    chance = float((tokens[i] == tokens[j]).double().mean())
    tries = max(1, round(chance * len(tokens) * (len(tokens) - 1) / 2))
    return in_every_mode(name, metric, {mode: pairs_found(bases, tokens) for mode, bases in spaces.items()}, chance, tries)


def equal_pairs(subject: Subject) -> list[Attack]:
    """See the module."""
    spaces = {mode: column_spaces(rows) for mode, rows in subject.caches.items()}
    return pairs_in_every_mode("equal_pairs", "fraction of pairs of equal tokens found", spaces, subject.tokens)
