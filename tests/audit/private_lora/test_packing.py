from __future__ import annotations

from dataclasses import replace

import pytest

from cloven.audit.private_lora.packing import exact_by_packing, packing, weights_per_answer
from tests.audit.private_lora.targets import COLUMNS, Elsewhere, target


@pytest.mark.parametrize(("bits", "each"), [(8, 1), (12, 1), (15, 1), (16, 2)])
def test_packing_gives_as_many_columns_per_answer_as_its_bits_hold(bits: int, each: int) -> None:
    (attack,) = packing(target(budget=7, bits=bits))
    assert attack.value == pytest.approx(7 * each / COLUMNS) and attack.tries == 7 * each and attack.weakened_value == 1.0
    assert attack.value <= attack.chance == min(1.0, 7 * bits / (8 * COLUMNS)) and attack.verdict == "measured"
    (wide,) = packing(target(bits=bits))
    assert wide.verdict == "broken" and wide.value == 1.0 and weights_per_answer(bits) == each


def test_large_matrices_are_shown_in_part_and_counted_in_full() -> None:
    one = target(2, 1100)
    (attack,) = packing(one)
    assert attack.tries == 1024 and attack.value == 1.0
    (few,) = packing(replace(one, budget=110))
    assert few.value == pytest.approx(0.2)


def test_answers_of_another_matrix_give_nothing() -> None:
    assert exact_by_packing(Elsewhere(**vars(target())), COLUMNS // 2) < 0.1
