from __future__ import annotations

import pytest
import torch

from cloven.audit.private_lora.regression import explained, regression
from tests.audit.private_lora.targets import COLUMNS, SMALL, audited, codes_of, generator, target

REGRESSIONS = ("regression_quarter", "regression_half", "regression_all", "regression_budget")


def test_regression_needs_as_many_answers_as_there_are_columns() -> None:
    quarter, half, everything, budget = regression(target(budget=6))
    assert abs(quarter.value - 0.25) < 0.15 and abs(half.value - 0.5) < 0.15 and everything.value > 0.9
    assert budget.tries == 6 and budget.value < 0.35 and budget.chance == 6 / COLUMNS
    assert "6 honest answers" in budget.metric


def test_regression_asks_no_more_than_it_needs() -> None:
    assert regression(target(budget=10**9))[3].tries == 2 * COLUMNS


def test_the_regression_does_not_depend_on_the_hint_and_grows_with_the_queries() -> None:
    for hint, bits in (("lwe", 16), ("statistical", 8)):
        quarter, half, everything = (audited(SMALL, bits, hint)[name] for name in REGRESSIONS[:3])
        assert [one.tries for one in (quarter, half, everything)] == [COLUMNS // 4, COLUMNS // 2, COLUMNS]
        assert quarter.value < half.value < everything.value
        assert (quarter.chance, half.chance, everything.chance) == (0.25, 0.5, 1.0)


def test_the_verdict_on_half_of_the_queries_is_the_same_for_all_matrices() -> None:
    """`regression_half` reaches 0.5 ± 0.01: "broken" must not begin there, or two preparations of one adapter differ in it."""
    assert len({regression(target(seed=seed))[1].verdict for seed in range(16)}) == 1


def test_what_is_explained_without_errors_and_by_nothing() -> None:
    w = codes_of(3, 10).double()
    x = torch.randn(10, 10, dtype=torch.float64, generator=generator())
    assert explained(x, x @ w.t(), w) == pytest.approx(1.0)
    assert explained(x, torch.zeros(10, 3, dtype=torch.float64), w) == 0.0
