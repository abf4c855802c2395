from __future__ import annotations

from dataclasses import replace

import pytest

from cloven.audit.private_lora.unit_queries import exact_by_units, unit_queries
from tests.audit.private_lora.targets import COLUMNS, Elsewhere, target


@pytest.mark.parametrize("budget", [1, 5, 24, 47, 48, 1000])
def test_unit_queries_give_one_column_per_answer(budget: int) -> None:
    (attack,) = unit_queries(target(budget=budget))
    assert attack.value == pytest.approx(min(1.0, budget / COLUMNS)) and attack.weakened_value == 1.0
    assert attack.verdict == ("broken" if budget >= 24 else "measured")
    assert attack.chance == min(1.0, 2 * budget / COLUMNS) and attack.tries == min(budget, COLUMNS)


def test_large_matrices_are_shown_in_part_and_counted_in_full() -> None:
    one = target(2, 1100)
    (attack,) = unit_queries(one)
    assert attack.tries == 1024 and attack.value == 1.0
    (few,) = unit_queries(replace(one, budget=110))
    assert few.value == pytest.approx(0.1)


def test_answers_of_another_matrix_give_nothing() -> None:
    assert exact_by_units(Elsewhere(**vars(target())), COLUMNS) < 0.1
