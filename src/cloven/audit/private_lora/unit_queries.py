"""Do large unit vectors read the weights off?

Adversary: A6, a client that wants the adapter and chooses its queries.
Method: c = ⌊p/255⌋·e_i, far above the norm of honest queries: every one of the 255 values of a weight gives another answer. One weight of
    every row per answer, as many as the budget allows.
Success: the share of the weights that are exact. Chance: the information bound on as many answers. Broken from one half on.
Weakened: no budget.
Source: ours.
"""

from __future__ import annotations

import torch

from cloven.audit.attack import Attack
from cloven.audit.private_lora.chosen_queries import CODES, nearest, within_budget
from cloven.audit.private_lora.subject import SHOWN_COLUMNS, Target
from cloven.field.residues import P, centre


def exact_by_units(target: Target, count: int) -> float:
    """Share of the first `count` columns' weights that as many answers give exactly."""
    step = P // CODES
    c = torch.zeros(count, target.matrix.shape[1], dtype=torch.int32)
    c[torch.arange(count), target.parameters.pad_columns + torch.arange(count)] = step
    table = centre(torch.arange(-127, 128) * step)
    found = nearest(target.answer(c), table) - 127
    return float((found.t() == target.codes[:, :count]).double().mean())


def unit_queries(target: Target) -> list[Attack]:
    """See the module."""
    count = min(target.codes.shape[1], SHOWN_COLUMNS, target.budget)
    exact = exact_by_units(target, count)
    what = "large unit vectors: one weight of every row per answer"
    return [within_budget(target, "unit_queries", what, exact, count, count)]
