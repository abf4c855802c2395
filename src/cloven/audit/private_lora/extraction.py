"""Extraction against queries: how much of the weights each attack by queries has after how many answers, beside the information bound."""

from __future__ import annotations

import torch

from cloven.audit.figure import Figure
from cloven.audit.private_lora.packing import exact_by_packing, weights_per_answer
from cloven.audit.private_lora.regression import explained
from cloven.audit.private_lora.subject import Target, attackers_choices
from cloven.audit.private_lora.unit_queries import exact_by_units
from cloven.private_lora.config import revealed_share

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of the columns: answers at which it is measured
MOST_COLUMNS = 512  # of wider matrices as many: the inputs are zero elsewhere


def extraction(target: Target) -> Figure:
    """The curves; every point is measured, but for those of the bound.

    Shares are of the columns that are asked for. The bound takes 8 bits for a weight, as the chance of the attacks does.
    """
    columns = min(target.codes.shape[1], MOST_COLUMNS)
    w = target.codes[:, :columns].double()
    x = torch.zeros(columns, target.codes.shape[1], dtype=torch.float64)
    x[:, :columns] = torch.randn(columns, columns, dtype=torch.float64, generator=attackers_choices(target.seed))
    answers = target.honest(x)
    each = weights_per_answer(target.bits)
    series: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("least squares on honest answers", "unit queries", "packing", "information bound, 8 bits per weight")
    }
    for count in sorted({max(1, round(share * columns)) for share in SHARES}):
        packed = min(count, max(1, columns // each))  # more are not needed
        found = (
            explained(x[:count, :columns], answers[:count], w),
            exact_by_units(target, count) * count / columns,
            exact_by_packing(target, packed) * each * packed / columns,
            revealed_share(count, columns, target.bits, 8.0),
        )
        for points, share in zip(series.values(), found, strict=True):
            points.append((float(count), share))
    part = "" if columns == target.codes.shape[1] else f", {columns:,} of {target.codes.shape[1]:,} columns"
    title = f"Extraction against queries{part}; the ledger's budget is {target.budget:,} answers"
    return Figure("extraction", title, "answers", "share of the weights recovered", series)
