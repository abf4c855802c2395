from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.errors import BadInput, RunError
from cloven.field.codec import ZERO_NORM, RowBounds, decode, encode, row_bounds
from cloven.field.residues import H
from tests.helpers import random_codes

CODES = st.integers(-127, 127)


def exact_products(codes: Tensor, x_int: Tensor) -> list[list[int]]:
    return [[sum(a * b for a, b in zip(row, x, strict=True)) for row in codes.tolist()] for x in x_int.tolist()]


def assert_no_wrap(codes: Tensor, x: Tensor) -> Tensor:
    x_int, alpha = encode(x, row_bounds(codes))
    assert x_int.dtype == torch.int32
    assert alpha.shape == (x.shape[0], 1)
    assert int(x_int.abs().max()) <= H  # residues themselves
    products = exact_products(codes, x_int)
    assert all(abs(y) <= H for row in products for y in row)
    return x_int


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    codes = draw(st.lists(st.lists(CODES, min_size=k, max_size=k), min_size=n, max_size=n))
    floats = st.floats(-1e30, 1e30, allow_nan=False) | st.sampled_from([0.0, 1.0, -1.0, 5e-324, 1e4, 2.0**-100, 2.0**-101])
    x = draw(st.lists(floats, min_size=k, max_size=k))
    return torch.tensor(codes, dtype=torch.int8), torch.tensor([x], dtype=torch.float64)


@given(problems())
def test_no_product_wraps(problem: tuple[Tensor, Tensor]) -> None:
    assert_no_wrap(*problem)


@given(problems())
def test_the_error_of_the_round_trip_is_bounded(problem: tuple[Tensor, Tensor]) -> None:
    codes, x = problem
    x_int, alpha = encode(x, row_bounds(codes))
    if float(torch.linalg.vector_norm(x)) < ZERO_NORM:
        assert not x_int.any()
        return
    scale = Fraction(float(alpha[0, 0]))
    for row, y_int in zip(codes.tolist(), exact_products(codes, x_int)[0], strict=True):
        exact = sum((w * Fraction(value) for w, value in zip(row, x[0].tolist(), strict=True)), Fraction(0))
        rounding = Fraction(sum(map(abs, row)), 2)
        # each entry of α·x is itself computed in float64, so it is off by up to 2^-53 of its size (≤ H) before it is rounded
        assert abs(y_int - scale * exact) <= rounding + sum(map(abs, row)) * Fraction(H, 2**52)
        decoded = float(decode(torch.tensor([[y_int]]), alpha)[0, 0])
        assert math.isclose(decoded, float(Fraction(y_int) / scale), rel_tol=1e-15)


def test_one_by_one_uses_the_field_but_does_not_wrap() -> None:
    x_int = assert_no_wrap(torch.tensor([[1]], dtype=torch.int8), torch.tensor([[1.0]], dtype=torch.float64))
    assert int(x_int) > 0.99999 * H


def test_float32_would_wrap() -> None:
    # H is no float32: the nearest one is 2^30, which is not a residue. In float64 the same formula stays inside.
    for room in (H, H - 0.5):
        assert int(torch.tensor(room, dtype=torch.float32).round()) == 2**30 > H
        assert int(torch.tensor(room, dtype=torch.float64).floor()) <= H


@pytest.mark.parametrize("k", [1, 2, 64, 4096])
def test_x_parallel_to_the_longest_row(k: int) -> None:
    codes = torch.cat([random_codes(3, k) // 4, torch.full((1, k), 127, dtype=torch.int8)])
    for sign in (1.0, -1.0):
        x_int = assert_no_wrap(codes, sign * 3.7 * codes[3:].to(torch.float64))
        largest = max(abs(y) for y in exact_products(codes, x_int)[0])
        assert largest > 0.999 * H  # Cauchy–Schwarz is an equality here, so nothing is wasted either


def test_rounding_has_its_room() -> None:
    # all entries of a constant row round the same way: for some of these lengths up, by nearly ½‖W‖₁ in all
    for k in range(1000, 1100):
        codes = torch.full((1, k), 127, dtype=torch.int8)
        x_int, _ = encode(torch.ones(1, k, dtype=torch.float64), row_bounds(codes))
        assert 127 * int(x_int.sum()) <= H


@pytest.mark.parametrize("outlier", [1e4, -1e4, 1e30])
def test_outliers(outlier: float) -> None:
    codes = random_codes(16, 256)
    x = torch.randn(4, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 17] = outlier
    assert_no_wrap(codes, x)
    assert_no_wrap(codes, torch.full((1, 256), outlier, dtype=torch.float64))


@pytest.mark.parametrize("size", [0.0, 5e-324, 1e-310, 1e-40])
def test_tiny_rows_encode_as_zeros(size: float) -> None:
    codes = random_codes(4, 8)
    x = torch.ones(3, 8, dtype=torch.float64)
    x[1] = size
    x_int, alpha = encode(x, row_bounds(codes))
    assert not x_int[1].any()
    assert float(alpha[1]) == 1.0
    assert x_int[0].any()
    assert torch.equal(x_int[0], x_int[2])  # a tiny neighbour changes nothing
    assert torch.equal(decode(torch.zeros(3, 4, dtype=torch.int32), alpha), torch.zeros(3, 4, dtype=torch.float64))


def test_just_above_the_zero_norm_is_encoded() -> None:
    x = torch.tensor([[2 * ZERO_NORM]], dtype=torch.float64)
    x_int = assert_no_wrap(torch.tensor([[127]], dtype=torch.int8), x)
    assert int(x_int) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad: float) -> None:
    x = torch.ones(3, 4, dtype=torch.float64)
    x[2, 1] = bad
    with pytest.raises(RunError, match="NaN or infinity"):
        encode(x, RowBounds(10, 5.0))


def test_row_bounds_are_upper_bounds() -> None:
    codes = random_codes(2500, 33)  # more rows than one block of the computation
    codes[2400] = 127
    bounds = row_bounds(codes)
    assert bounds.l1 == 127 * 33
    assert Fraction(bounds.l2) ** 2 >= 127 * 127 * 33
    assert math.isclose(bounds.l2, 127 * math.sqrt(33))
    assert row_bounds(torch.zeros(3, 4, dtype=torch.int8)) == RowBounds(0, 0.0)
    assert row_bounds(torch.full((1, 5), -128, dtype=torch.int8)).l1 == 640  # |−128| does not overflow


@given(st.lists(CODES, min_size=1, max_size=6))
def test_l2_is_rounded_up(row: list[int]) -> None:
    bounds = row_bounds(torch.tensor([row], dtype=torch.int8))
    assert Fraction(bounds.l2) ** 2 >= sum(v * v for v in row)


def test_a_zero_matrix_still_gives_residues() -> None:
    assert_no_wrap(torch.zeros(2, 3, dtype=torch.int8), torch.tensor([[1e9, -3.0, 0.0]], dtype=torch.float64))


def test_noise_takes_its_room() -> None:
    codes = torch.full((1, 16), 127, dtype=torch.int8)
    x = torch.ones(1, 16, dtype=torch.float64)
    noise = 2.0**28
    x_int, _ = encode(x, row_bounds(codes), noise)
    assert abs(exact_products(codes, x_int)[0][0]) <= H - noise
    with pytest.raises(BadInput, match="no room"):
        encode(x, row_bounds(codes), float(H))


@pytest.mark.parametrize(("l1", "l2"), [(-1, 0.0), (H, 1.0), (5, 6.0), (5, -1.0), (5, math.nan), (5, math.inf)])
def test_impossible_bounds_are_refused(l1: int, l2: float) -> None:
    with pytest.raises(BadInput, match="row bounds"):
        RowBounds(l1, l2)


def test_no_rows_and_rows_too_long_for_a_norm() -> None:
    x_int, alpha = encode(torch.zeros(0, 8, dtype=torch.float64), RowBounds(100, 10.0))
    assert x_int.shape == (0, 8) and alpha.shape == (0, 1)
    with pytest.raises(RunError, match="nothing was sent"):
        encode(torch.full((1, 8), 1e200, dtype=torch.float64), RowBounds(100, 10.0))


def test_any_integers_are_decoded() -> None:
    """A homomorphic backend's answers are int64."""
    y, alpha = random_codes(3, 5).long() * 2**33, torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    assert torch.equal(decode(y, alpha), y.double() / alpha)
