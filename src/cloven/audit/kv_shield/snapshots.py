"""Do two sessions with the same text show more of it?

Adversary: A3, who has snapshots of layer 0's rows of v from two sessions with one text.
Method: keys and noise are fresh in every session, the plain rows are not: what the column spaces of both have in common, the d directions
    with the smallest angles between them, is free of noise. Places are then compared as in `equal_pairs`. In the other modes the first
    snapshot is taken twice.
Success: the share of the chosen pairs that hold equal tokens. Chance: the share of such pairs among all.
Weakened: mode none, a cache without keys.
Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.equal_pairs import column_spaces, pairs_in_every_mode
from cloven.audit.kv_shield.subject import Subject


def shared_spaces(first: list[Tensor], second: list[Tensor], dimensions: int) -> list[Tensor]:
    """What two column spaces have in common: the `dimensions` directions with the smallest angles, for every head."""
    shared = []
    for a, b in zip(first, second, strict=True):
        u, _, _ = torch.linalg.svd(a.t() @ b)
        shared.append(a @ u[:, :dimensions])
    return shared


def snapshots(subject: Subject) -> list[Attack]:
    """See the module."""
    spaces = {}
    for mode, rows in subject.caches.items():
        other = subject.second if mode == "session" else rows
        spaces[mode] = shared_spaces(column_spaces(rows), column_spaces(other), subject.layer.shape.head_dim)
    return pairs_in_every_mode(
        "snapshots", "fraction of pairs of equal tokens found from two sessions with one text", spaces, subject.tokens
    )
