"""Can the server tell which of two inputs was asked?

Adversary: A5, a server that wants the input, and knows the two inputs that it may be.
Method: 200 queries for one of the two, by a coin; the server guesses by the query's correlation with their difference.
Success: the share of right guesses. Chance: one half. Broken when it is more than four standard deviations away from that, on either side.
Weakened: an earlier query, for zeros, had the same (s, e), so that their difference is the input.
Source: the game that defines semantic security; the statistic is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack, Verdict
from cloven.audit.private_lora.subject import SCHEME, SERVER, Target
from cloven.field.residues import add, subtract

_TRIES = 200


def coin_verdict(value: float, tries: int) -> Verdict:
    """Whether guesses of a coin are believed to be guesses."""
    return "holds" if abs(value - 0.5) <= 4 * (0.25 / tries) ** 0.5 else "broken"


def distinguishing(target: Target) -> list[Attack]:
    """See the module."""
    rows, _ = target.encoded(torch.randn(2, target.codes.shape[1], dtype=torch.float64, generator=target.random))
    coins = torch.randint(0, 2, (_TRIES,), generator=target.random)
    masks = target.masks()
    difference = (rows[1] - rows[0]).double()
    middle = (rows[1].double() + rows[0].double()) / 2

    def guessed(seen: Tensor) -> float:
        guesses = ((seen.double() - middle) @ difference > 0).long()
        return float((guesses == coins).double().mean())

    value = guessed(masks.take(_TRIES).mask(rows[coins]))
    earlier = masks.take(_TRIES).mask(torch.zeros_like(rows[coins]))  # a query for zeros: the bare mask
    weakened = guessed(subtract(add(rows[coins], earlier), earlier))
    metric = "fraction of queries told apart, of two inputs that the server knows"
    return [Attack("distinguish", SCHEME, SERVER, metric, value, 0.5, weakened, _TRIES, coin_verdict(value, _TRIES))]
