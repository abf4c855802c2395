from __future__ import annotations

import pytest
import torch

from cloven.audit.plots import svg_of
from cloven.audit.private_lora.extraction import SHARES, extraction
from tests.audit.private_lora.targets import COLUMNS, Elsewhere, target

LINES = ["least squares on honest answers", "unit queries", "packing", "information bound, 8 bits per weight"]


@pytest.mark.parametrize(("bits", "each"), [(16, 2), (8, 1)])
def test_every_line_is_what_its_attack_reaches(bits: int, each: int) -> None:
    figure = extraction(target(bits=bits, budget=77))
    assert list(figure.series) == LINES and figure.mark is None and "77 answers" in figure.title and "columns" not in figure.title
    counts = [share * COLUMNS for share in SHARES]
    squares, units, packed, bound = (dict(points) for points in figure.series.values())
    assert all(list(line) == counts for line in (squares, units, packed, bound))
    for count in counts:
        assert units[count] == pytest.approx(count / COLUMNS) and packed[count] == pytest.approx(min(1.0, each * count / COLUMNS))
        assert bound[count] == min(1.0, bits * count / (8 * COLUMNS)) and abs(squares[count] - count / COLUMNS) < 0.15
        assert max(units[count], packed[count]) <= bound[count] + 1e-9
    assert squares[COLUMNS] > 0.9
    assert "<svg" in svg_of(figure)


def test_answers_of_another_matrix_recover_nothing() -> None:
    squares, units, packed, _ = ([share for _, share in points] for points in extraction(Elsewhere(**vars(target()))).series.values())
    assert max(squares) < 0.2 and max(units) < 0.1 and max(packed) < 0.1


def test_of_wide_matrices_a_part_is_shown() -> None:
    figure = extraction(target(2, 600))
    assert "512 of 600 columns" in figure.title
    assert all(points[-1][0] == 512 and points[-1][1] > 0.9 for points in figure.series.values())


def test_few_columns() -> None:
    figure = extraction(target(2, 3))
    assert [count for count, _ in figure.series["packing"]] == [1, 2, 3]
    assert figure.series["unit queries"][-1][1] == 1.0


def test_it_takes_no_random_numbers_from_the_attacks() -> None:
    one = target()
    before = one.random.get_state()
    extraction(one)
    assert torch.equal(one.random.get_state(), before)
