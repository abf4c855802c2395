"""How many weights fit into one answer?

Adversary: A6, a client that wants the adapter and chooses its queries.
Method: c = Σ_k ⌊p/255^k⌋·e_{i+k}, through the wrap: as many weights of every row per answer as its b bits hold, ⌊b/8⌋, as many answers as
    the budget allows.
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


def weights_per_answer(bits: int) -> int:
    """Weights of every row that an answer of so many bits holds."""
    return max(1, bits // 8)


def exact_by_packing(target: Target, answers: int) -> float:
    """Share of the weights that so many answers give exactly, of the columns that they are about: the first ones."""
    codes, each = target.codes, weights_per_answer(target.bits)
    steps = [P // CODES ** (k + 1) for k in range(each)]
    c = torch.zeros(answers, target.matrix.shape[1], dtype=torch.int32)
    for k, step in enumerate(steps):
        c[torch.arange(answers), target.parameters.pad_columns + each * torch.arange(answers) + k] = step
    weights = torch.cartesian_prod(*[torch.arange(-127, 128)] * each).view(-1, each)  # [255^each, each]
    table = centre((weights * torch.tensor(steps)).sum(1))
    found = weights[nearest(target.answer(c), table)]  # [answers, N, each]
    return float((found.permute(1, 0, 2).reshape(len(codes), -1) == codes[:, : each * answers]).double().mean())


def packing(target: Target) -> list[Attack]:
    """See the module."""
    each = weights_per_answer(target.bits)
    answers = min(min(target.codes.shape[1], SHOWN_COLUMNS) // each, target.budget)
    exact = exact_by_packing(target, answers)
    what = f"{each} weights of every row per answer, through the wrap"
    return [within_budget(target, "packing", what, exact, each * answers, answers)]
