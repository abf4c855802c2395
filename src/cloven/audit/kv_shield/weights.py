"""Do the device's weights show the keys?

Adversary: A4, who has the public model and the weights on the accelerator.
Method: the permutations of mode permute are folded into the device's W_v; for every row of it the nearest row of the public W_v, within its
    head, is looked up. In mode session the device's weights are the public ones.
Success: the share of the rows whose place is found; in mode session the share that are out of place, hence keyed. Chance: 1 / d.
Weakened: mode none, the public weights, every row of which is found in its place.
Source: published for permutation-based schemes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.guesses import DEVICE, hits, in_every_mode, nearest
from cloven.audit.kv_shield.subject import Subject, keys_of
from cloven.kv_shield.keys import permutations


def match_rows(exposed: Tensor, public: Tensor, heads: int) -> Tensor:
    """For every row of the device's W_v the nearest row of the public one, within its head; [rows]."""
    size = len(public) // heads
    return torch.cat([nearest(a, b) + size * head for head, (a, b) in enumerate(zip(exposed.split(size), public.split(size), strict=True))])


def weights(subject: Subject) -> list[Attack]:
    """See the module."""
    public, heads, d = subject.layer.weight, subject.layer.shape.kv_heads, subject.layer.shape.head_dim
    stream = keys_of(subject.seed, "weights")
    order = (permutations(stream, heads, d) + d * torch.arange(heads)[:, None]).flatten()
    keyed = hits(match_rows(public[order], public, heads), order)
    in_place = hits(match_rows(public, public, heads), torch.arange(len(public)))  # the weights of none and session
    found = {"none": in_place, "permute": keyed, "session": 1 - in_place}  # sealing changes the cache alone
    metric = "fraction of the rows whose place is found in the device's weights (session: that are out of place, hence keyed)"
    return in_every_mode("weights", metric, found, 1 / d, len(public), DEVICE)
