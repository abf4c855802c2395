"""What attacks by chosen queries have in common: the circle of residues, and what a budget of answers gives."""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.private_lora.subject import CLIENT, SCHEME, Target
from cloven.field.residues import P
from cloven.private_lora.config import revealed_share

CODES = 255  # values of an int8 weight


def nearest(z: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of `table` (residues [T]) that is nearest to each z (residues [M, N]) on the circle of residues."""
    order = torch.argsort(table)
    ordered = table[order].long()
    circle = torch.cat([ordered[-1:] - P, ordered, ordered[:1] + P])
    place = torch.searchsorted(circle, z.long()).clamp(1, len(circle) - 1)
    left = (z.long() - circle[place - 1]).abs() <= (circle[place] - z.long()).abs()
    return order[(place - left.long() - 1) % len(table)]


def within_budget(target: Target, name: str, what: str, exact: float, shown: int, answers: int) -> Attack:
    """`exact`: share of the `shown` columns that `answers` answers gave exactly; the rest of the budget goes on like that."""
    columns = target.codes.shape[1]
    value = exact * min(1.0, target.budget * (shown / answers) / columns)
    bound = revealed_share(target.budget, columns, target.bits, 8.0)
    metric = f"fraction of the weights exact, within the budget of {target.budget:,} answers ({what}); chance: the information bound"
    return Attack(name, SCHEME, CLIENT, metric, value, bound, exact, shown, "broken" if value >= 0.5 else "measured")
