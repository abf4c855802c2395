"""Do the weights follow from the hint?

Adversary: A6, a client that wants the adapter and holds the hint H = W' A_pub + E_h, W' = [R | W].
Method: solve W A = H for W by linear algebra over F_p, as if there were no pad R and no error E_h, for at most 512 columns; all other
    columns are known.
Success: the share of the weights that follow. Chance: 1 / p.
Weakened: a hint without a pad.
Source: linear algebra; that the hint is an LWE sample with secret R is the scheme's own.
"""

from __future__ import annotations

from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.linear_algebra import solve_left
from cloven.audit.private_lora.subject import CLIENT, SCHEME, Target
from cloven.field.products import multiply
from cloven.field.residues import P, subtract
from cloven.field.selection import select_backend
from cloven.masks.public_matrix import a_pub


def hint_inversion(target: Target) -> list[Attack]:
    """See the module."""
    columns = min(target.codes.shape[1], 512)
    codes, known = target.codes[:, :columns], target.codes[:, columns:]
    first = target.parameters.pad_columns
    rows = a_pub(target.matrix.shape[1])[first:, :columns]
    a = rows[:columns]  # square: as many equations as unknowns

    def product(part: Tensor, weights: Tensor) -> Tensor:
        return multiply(select_backend("cpu"), part.t().contiguous(), select_backend("cpu").place(weights.contiguous())).t()

    def recovered(hint: Tensor) -> float:
        rest = subtract(hint, product(rows[columns:], known).contiguous()) if known.shape[1] else hint
        return float((solve_left(a, rest) == codes.long()).double().mean())

    value = recovered(target.hint[:, :columns].contiguous())
    weakened = recovered(product(rows, target.codes).contiguous())
    chance, tries = 1 / P, codes.numel()
    metric = f"fraction of {columns} columns' weights that follow from the hint by linear algebra, all other columns known"
    return [Attack("hint_inversion", SCHEME, CLIENT, metric, value, chance, weakened, tries, verdict_of(value, chance, tries))]
