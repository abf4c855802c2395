from __future__ import annotations

import secrets

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.mixing import COLUMNS, ROUNDS, ROWS, Mixing


def fresh(n: int, sizes_in: int = COLUMNS) -> Mixing:
    return Mixing.fresh(n, SecretStream(secrets.token_bytes(KEY_BYTES), "test"), sizes_in)


def matrix_of(mixing: Mixing) -> Tensor:
    """R [n, n]."""
    return torch.from_numpy(mixing.apply(np.eye(mixing.gather.shape[1]))).t()


@given(n=st.integers(1, 300), seed=st.integers(0, 2**32), sizes_in=st.sampled_from([COLUMNS, ROWS]))
def test_it_can_be_undone_and_transposed(n: int, seed: int, sizes_in: int) -> None:
    mixing, x = fresh(n, sizes_in), np.random.default_rng(seed).standard_normal((3, n))
    y, r = mixing.apply(x), matrix_of(mixing).numpy()
    assert np.allclose(y, x @ r.T) and np.allclose(mixing.undone(y), x, atol=1e-12)
    assert np.allclose(mixing.transposed(x), x @ r) and np.allclose(mixing.undone_on_rows(x), x @ np.linalg.inv(r))
    assert np.allclose((mixing.undone_on_rows(x) * y).sum(1), (x * x).sum(1))  # what meets what: ⟨R⁻ᵀ x, R x⟩ = ⟨x, x⟩


@given(n=st.integers(1, 300))
def test_without_its_sizes_it_is_a_rotation(n: int) -> None:
    mixing = fresh(n)
    r = matrix_of(Mixing(mixing.gather, mixing.scale.sign()))
    assert torch.allclose(r @ r.t(), torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert n < 64 or not torch.allclose(matrix_of(mixing) @ matrix_of(mixing).t(), torch.eye(n, dtype=torch.float64), atol=0.1)


@pytest.mark.parametrize("n", [256, 300, 1344])
def test_no_entry_stays_whole(n: int) -> None:
    """Where it was one, no coordinate of the result holds more than a small part; a permutation leaves it in one place."""
    largest = matrix_of(fresh(n)).abs().max(0).values
    assert float(largest.max()) < 0.6 and float(largest.median()) < 0.4


def test_every_key_gives_another_one() -> None:
    first, second = (matrix_of(fresh(256)) for _ in range(2))
    first, second = (torch.nn.functional.normalize(one, dim=1) for one in (first, second))
    relation = first @ second.t()
    assert float(relation.abs().max()) < 0.5 and float(relation.square().mean()) == pytest.approx(1 / 256, rel=0.1)


def test_none_and_units() -> None:
    x = np.random.default_rng(0).standard_normal((2, 9))
    none = Mixing.none(9)
    assert all(np.array_equal(change(x), x) for change in (none.apply, none.transposed, none.undone, none.undone_on_rows))
    mixing, units = fresh(9), torch.arange(9.0)
    assert np.allclose(mixing.scaled(units).apply(x.copy()), mixing.apply(x.copy()) * units.numpy())
    assert mixing.scaled(units).scale.dtype == torch.float32 and mixing.gather.shape == (ROUNDS, 9)


def test_the_same_stream_gives_the_same_and_repr_is_silent() -> None:
    first, second = (Mixing.fresh(40, SecretStream(bytes(KEY_BYTES), "x"), ROWS) for _ in range(2))
    assert torch.equal(first.gather, second.gather) and torch.equal(first.scale, second.scale)
    assert repr(first) == "Mixing((3, 40), <secret>)"
