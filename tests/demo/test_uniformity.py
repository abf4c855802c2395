from __future__ import annotations

import math

import pytest
import torch

from cloven.demo.uniformity import chi_square_of_low_bytes
from cloven.field.prg import pad_residues
from cloven.field.residues import add
from tests.helpers import random_residues

KEY = bytes(range(32))


def low_bytes(residues: torch.Tensor) -> torch.Tensor:
    return (residues & 0xFF).flatten()


def tail(statistic: float) -> float:
    """P(χ² with 255 degrees of freedom > statistic) by the finite series for an odd number of degrees (Abramowitz and Stegun 26.4.4)."""
    x = statistic / 2
    series = sum(math.exp((j - 0.5) * math.log(x) - x - math.lgamma(j + 0.5)) for j in range(1, 128)) if x else 0.0
    return math.erfc(math.sqrt(x)) + series


@pytest.mark.parametrize("d", [0, 5, 9, 10, 11, 12, 15])
def test_against_another_formula(d: int) -> None:
    """100 + d occurrences of each byte in the lower half, 100 − d in the upper: the statistic is 256 · d² / 100."""
    counts = torch.tensor([100 + d] * 128 + [100 - d] * 128)
    values = torch.repeat_interleave(torch.arange(256), counts)
    assert chi_square_of_low_bytes(values) == pytest.approx(tail(2.56 * d * d), rel=1e-6)


def test_a_known_value() -> None:
    assert tail(293.2478) == pytest.approx(0.05, abs=1e-5)  # the tables' 5 % point


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_any_integers(dtype: torch.dtype) -> None:
    assert chi_square_of_low_bytes(torch.arange(256).repeat(9).to(dtype)) == pytest.approx(1.0)


def test_masks_are_uniform() -> None:
    assert chi_square_of_low_bytes(low_bytes(pad_residues(KEY, 0, 0, 200, 500))) > 1e-6


def test_masked_activations_are_uniform_and_bare_ones_are_not() -> None:
    x_int = (torch.randn(200, 500, generator=torch.Generator().manual_seed(0)) * 40).round().to(torch.int32)
    assert chi_square_of_low_bytes(low_bytes(add(x_int, pad_residues(KEY, 0, 0, 200, 500)))) > 1e-6
    assert chi_square_of_low_bytes(low_bytes(x_int)) < 1e-12


def test_a_slight_skew_is_found() -> None:
    """One value in a hundred replaced."""
    residues = random_residues(400, 500)
    residues[:, ::100] = 7
    assert chi_square_of_low_bytes(low_bytes(residues)) < 1e-12


def test_reused_masks_are_found_in_differences() -> None:
    """c − c' under one mask is x − x': the bytes of a difference are then not uniform."""
    mask = pad_residues(KEY, 0, 0, 100, 500)
    first, second = ((torch.randn(100, 500, generator=torch.Generator().manual_seed(s)) * 20).round().to(torch.int32) for s in (1, 2))
    assert chi_square_of_low_bytes(low_bytes(add(first, mask) - add(second, mask))) < 1e-12
    other = pad_residues(KEY, 0, 100, 100, 500)
    assert chi_square_of_low_bytes(low_bytes(add(add(first, mask), -add(second, other)))) > 1e-6


def test_the_same_block_over_and_over_is_found() -> None:
    residues = random_residues(1, 500).repeat(300, 1)
    assert chi_square_of_low_bytes(low_bytes(residues)) < 1e-12
