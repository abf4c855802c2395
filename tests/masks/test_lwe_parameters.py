from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloven.errors import BadInput
from cloven.field.codec import encode
from cloven.field.residues import H, P
from cloven.masks.lwe_parameters import SPECIFICATION, LweParameters, lwe_parameters
from cloven.masks.public_matrix import COLUMNS
from cloven.private_lora.manifest import ClientGroup, ClientModule
from cloven.private_lora.prepare import _draw_pad
from cloven.private_lora.session import remote_bounds

HINTS = ("lwe", "statistical")


def test_the_two_sets() -> None:
    """The numbers of the security estimate: others are another scheme."""
    assert SPECIFICATION == 1
    assert lwe_parameters("lwe") == LweParameters("lwe", n=1280, sigma="6.4", sigma_hint="16", pad_columns=1280)
    assert lwe_parameters("statistical") == LweParameters("statistical", n=1280, sigma="6.4", sigma_hint="16", pad_columns=5056)
    assert COLUMNS == 1280


@pytest.mark.parametrize("name", ["", "LWE", "none", "lwe "])
def test_there_are_no_others(name: str) -> None:
    with pytest.raises(BadInput, match="choose lwe or statistical"):
        lwe_parameters(name)


# --- the leftover hash lemma


def log2_of(value: Fraction) -> float:
    """log2 of a positive fraction of any size: `math.log2` takes whole numbers of any length."""
    return math.log2(value.numerator) - math.log2(value.denominator)


def slow_distance(n: int, columns: int, rows: int) -> float:
    """log2 of r/2·√(p^n / 255^N), in whole numbers under the root."""
    return log2_of(Fraction(rows**2 * P**n, 4 * 255**columns)) / 2


@pytest.mark.parametrize("rows", [1, 2**10, 2**20, 2**24])
def test_the_formula(rows: int) -> None:
    parameters = lwe_parameters("statistical")
    assert math.isclose(parameters.hint_distance_log2(rows), slow_distance(1280, 5056, rows), rel_tol=1e-9)


def test_a_million_rows_are_within_2_to_minus_128() -> None:
    getcontext().prec = 60
    assert lwe_parameters("statistical").hint_distance_log2(2**20) <= -128
    assert slow_distance(1280, 5056, 2**20) <= -128
    smallest = (1280 * math.log2(P) + 2 * 127 + 2 * 20) / math.log2(255)  # the inequality solved for N
    assert math.ceil(smallest) == 5001 and slow_distance(1280, 5001, 2**20) <= -128 < slow_distance(1280, 5000, 2**20)
    in_decimal = Decimal(2) ** 19 * (Decimal(P) ** 1280 / Decimal(255) ** 5056).sqrt()
    assert in_decimal <= Decimal(2) ** -128


def test_a_pad_of_the_lwe_width_would_not_do() -> None:
    assert LweParameters("statistical").hint_distance_log2(1) > 0


def test_markov_for_one_public_matrix() -> None:
    """All but 2^-40 of the A_pub are within 2^40 times the average: 2^-88 at most."""
    assert lwe_parameters("statistical").hint_distance_log2(2**20) + 40 <= -88


# --- noise


def slow_noise(hint: str, l2: float, bits: int) -> float:
    """8·√(σ²(‖W‖² + (1.2·σ_R)²·N) + n·(σ_E·σ)²) + 2^(31−b), in decimal arithmetic."""
    getcontext().prec = 50
    sigma, n = Decimal("6.4"), 1280
    deviation, columns, error = (Decimal(16), 1280, Decimal(16)) if hint == "lwe" else ((Decimal(255**2 - 1) / 12).sqrt(), 5056, Decimal(0))
    pad = (Decimal("1.2") * deviation) ** 2 * columns
    variance = sigma**2 * (Decimal(l2) ** 2 + pad) + n * (error * sigma) ** 2
    return float(8 * variance.sqrt() + Decimal(2) ** (31 - bits))


@given(st.sampled_from(HINTS), st.integers(1, 2**14), st.integers(8, 31))
def test_the_noise_formula(hint: str, l2: int, bits: int) -> None:
    assert math.isclose(lwe_parameters(hint).noise(float(l2), bits), slow_noise(hint, float(l2), bits), rel_tol=1e-12)


def test_noise_grows_with_the_rows_and_falls_with_the_bits() -> None:
    for hint in HINTS:
        parameters = lwe_parameters(hint)
        assert parameters.noise(100, 16) < parameters.noise(200, 16) < parameters.noise(200, 12)
    assert lwe_parameters("lwe").noise(100, 16) < lwe_parameters("statistical").noise(100, 16)


@pytest.mark.parametrize("hint", HINTS)
def test_a_pad_stays_below_its_bound(hint: str) -> None:
    """And not by far: otherwise the bound would waste the field."""
    parameters = lwe_parameters(hint)
    norms = _draw_pad(60, parameters).double().norm(dim=1)
    assert float(norms.max()) < parameters.pad_norm
    assert abs(float(norms.mean()) * 1.2 / parameters.pad_norm - 1) < 0.02


@pytest.mark.parametrize("hint", HINTS)
def test_the_bound_on_a_pad_fails_less_often_than_2_to_minus_40(hint: str) -> None:
    """Laurent and Massart for χ²_k, and Hoeffding for bounded entries: P(‖R‖² ≥ 1.44·k·v)."""
    columns = lwe_parameters(hint).pad_columns
    if hint == "lwe":  # P(χ²_k ≥ k + 2√(kt) + 2t) ≤ e^-t
        t = 0.0
        while columns + 2 * math.sqrt(columns * t) + 2 * t < 1.44 * columns:
            t += 0.1
        assert t / math.log(2) > 40
    else:  # entries² in [0, 127²], mean v: e^(−2 k (0.44 v)² / 127⁴)
        v = (255**2 - 1) / 12
        assert 2 * columns * (0.44 * v) ** 2 / 127**4 / math.log(2) > 40


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("columns", [64, 4096, 14_336])
def test_there_is_room_in_the_field(hint: str, columns: int) -> None:
    """The bound on noise leaves most of the field to the product, for layers of usual widths and rows as large as int8 allows."""
    l2 = int(127 * columns**0.5) + 1
    noise = lwe_parameters(hint).noise(l2, 16)
    assert noise < 0.01 * H
    x_int, _ = encode(
        torch.ones(1, columns, dtype=torch.float64), remote_bounds(ClientGroup(columns, l2, (ClientModule("m", 1, 1),))), noise
    )
    assert int(x_int.abs().max()) * 127 * columns + noise <= H
