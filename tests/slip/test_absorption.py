from __future__ import annotations

import secrets

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.absorption import absorb
from cloven.slip.decomposition import Split, spectrum, split
from cloven.slip.exposed_matrix import expose


def stream() -> SecretStream:
    return SecretStream(secrets.token_bytes(KEY_BYTES), "test")


def whole(w: Tensor, rank: int) -> Split:
    return split(w, rank, spectrum(w), stream())


def error_of(w: Tensor, exposed: Tensor, part: Split, weights: Tensor) -> float:
    """Σ_j ‖(W − Ê − B A)_·j‖² w_j."""
    left = w - exposed - part.secret_b @ part.secret_a
    return float((left.square() * weights).sum())


@pytest.mark.parametrize("terms", [1, 2])
@given(rows=st.integers(4, 24), columns=st.integers(4, 24), seed=st.integers(0, 2**32))
def test_it_is_the_least_squares_solution(terms: int, rows: int, columns: int, seed: int) -> None:
    """Against the slow and obvious one: no small change of B makes the weighted error smaller, and it never grew."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    activations = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    part = whole(w, min(rows, columns) // 2)
    matrix = expose(part.exposed, terms, stream())
    (corrected,), _, _ = absorb([part], part.exposed, matrix, activations)
    exposed, weights = matrix.dequantised(), activations.square()
    best = error_of(w, exposed, corrected, weights)
    assert best <= error_of(w, exposed, part, weights) * (1 + 1e-9)
    gradient = (w - exposed - corrected.secret_b @ corrected.secret_a) * weights @ corrected.secret_a.t()
    assert float(gradient.abs().max()) <= 1e-9 * float(w.abs().max() * weights.max())
    assert torch.equal(corrected.secret_a, part.secret_a)


def test_what_is_reported() -> None:
    w = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    part = whole(w, 5)
    matrix = expose(part.exposed, 1, stream())
    (corrected,), error, energy = absorb([part], part.exposed, matrix, None)
    assert error == pytest.approx(error_of(w, matrix.dequantised(), corrected, torch.ones(20)), rel=1e-6)
    assert energy == pytest.approx(float(part.exposed.square().sum()))
    assert error < error_of(w, matrix.dequantised(), part, torch.ones(20))


def test_members_of_a_group_are_corrected_each_with_its_own_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    matrices = [torch.randn(rows, 16, dtype=torch.float64, generator=generator) for rows in (8, 24, 5)]
    parts = [whole(w, rank) for w, rank in zip(matrices, (2, 0, 1), strict=True)]
    stacked = torch.cat([part.exposed for part in parts])
    matrix = expose(stacked, 1, stream())
    corrected, _, _ = absorb(parts, stacked, matrix, None)
    start = 0
    for w, part in zip(matrices, corrected, strict=True):
        rows = slice(start, start + w.shape[0])
        start += w.shape[0]
        left = w - matrix.dequantised()[rows] - part.secret_b @ part.secret_a
        assert float(left.abs().max()) < 0.2  # a neighbour's rows would be off by the size of the weights
        assert part.secret_b.shape == (w.shape[0], part.secret_a.shape[0])
    assert corrected[1].secret_b.numel() == 0


def test_nothing_that_was_given_is_changed() -> None:
    w = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    part = whole(w, 3)
    before = [tensor.clone() for tensor in (part.exposed, part.secret_a, part.secret_b)]
    matrix = expose(part.exposed, 1, None)
    codes = matrix.codes.clone()
    absorb([part], part.exposed, matrix, torch.ones(10, dtype=torch.float64))
    assert all(torch.equal(now, then) for now, then in zip((part.exposed, part.secret_a, part.secret_b), before, strict=True))
    assert torch.equal(matrix.codes, codes)


def test_inputs_that_are_never_there() -> None:
    """A column with activation 0 has no say; a factor that only such columns carry stays finite."""
    w = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    part = whole(w, 3)
    matrix = expose(part.exposed, 1, stream())
    for activations in (torch.zeros(10, dtype=torch.float64), torch.eye(10, dtype=torch.float64)[0]):
        (corrected,), error, _ = absorb([part], part.exposed, matrix, activations)
        assert bool(torch.isfinite(corrected.secret_b).all())
        assert error >= 0
