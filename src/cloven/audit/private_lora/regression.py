"""What do honest answers give away of the weights?

Adversary: A6, a client that wants the adapter and asks as an honest one does, or all clients together.
Method: random inputs, honest queries, and least squares on what the client decodes: for a quarter, one half and all of the columns' number
    of answers, and for the ledger's budget.
Success: 1 − ‖Ŵ − W‖² / ‖W‖². Chance: the answers' share of the columns, which is what as many equations determine. Broken from 0.9 on;
    below, a share of the columns' number gives that share of the weights.
Weakened: no budget: twice as many answers as there are columns.
Source: linear algebra.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.private_lora.subject import BEYOND, CLIENT, SCHEME, Target


def explained(x: Tensor, answers: Tensor, weights: Tensor) -> float:
    """1 − the relative squared error of the weights that least squares finds, at least 0.

    Args:
        x: inputs, float64 [M, K].
        answers: float64 [M, N].
        weights: the true ones, float64 [N, K].
    """
    estimate = torch.linalg.lstsq(x, answers, driver="gelsd").solution.t()
    return max(0.0, 1 - float((estimate - weights).square().sum() / weights.square().sum()))


def regression(target: Target) -> list[Attack]:
    """See the module."""
    columns = target.codes.shape[1]
    w = target.codes.double()

    def recovered(queries: int) -> float:
        x = torch.randn(queries, columns, dtype=torch.float64, generator=target.random)
        return explained(x, target.honest(x), w)

    unlimited = recovered(2 * columns)
    result = []
    for name, queries in (
        ("quarter", columns // 4),
        ("half", columns // 2),
        ("all", columns),
        ("budget", min(target.budget, 2 * columns)),
    ):
        value = recovered(queries)
        result.append(
            Attack(
                f"regression_{name}",
                SCHEME if queries <= target.budget else BEYOND,
                CLIENT,
                f"1 − relative squared error of the weights, least squares on {queries} honest answers (weakened: no budget)",
                value,
                queries / columns if queries < columns else 1.0,
                unlimited,
                queries,
                "broken" if value >= 0.9 else "measured",  # a fraction of the columns' number gives that fraction
            )
        )
    return result
