"""The kernels for rows against their oracles, bit for bit; products and transforms have files of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.field import residues
from cloven.field.codec import encode_in_numpy
from cloven.field.freivalds import CHECKS, Freivalds
from cloven.field.native import library as module
from cloven.field.native.library import Kernels, kernels_in_use, load_kernels
from cloven.field.residues import H, P
from tests.helpers import random_residues

kernels = load_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the C++ kernels are not built")


def library() -> Kernels:
    assert kernels is not None
    return kernels


def floats(m: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, dtype=torch.float64, generator=generator) * torch.randn(m, 1, dtype=torch.float64, generator=generator).exp()


@given(m=st.integers(0, 5), n=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_add_and_subtract(m: int, n: int, seed: int) -> None:
    a, b = random_residues(m, n, seed), random_residues(m, n, seed + 1)
    a.flatten()[:2], b.flatten()[:2] = H, -H
    for sign, operation in ((1, np.add), (-1, np.subtract)):
        exact = (a.long() + sign * b.long() + H) % P - H
        assert torch.equal(library().add(a, b, sign).long(), exact)
        if m:
            assert torch.equal(residues._wrapped(operation, a, b).long(), exact)


@given(m=st.integers(0, 5), k=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_encode_and_decode(m: int, k: int, seed: int) -> None:
    x, scale = floats(m, k, seed), 0.9 * H
    ours, oracle = library().encode(x, scale), encode_in_numpy(x, scale)
    assert ours is not None and oracle is not None
    assert all(torch.equal(one, other) for one, other in zip(ours, oracle, strict=True))
    for row, alpha in zip(x.tolist(), ours[1].flatten().tolist(), strict=True):
        assert alpha == pytest.approx(scale / math.sqrt(math.fsum(value * value for value in row)), rel=1e-14)
    assert np.array_equal(library().decode(*ours).numpy(), ours[0].numpy() / ours[1].numpy())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_a_row_that_is_not_finite(bad: float) -> None:
    x = floats(3, 20, 0)
    x[1, 13] = bad
    assert library().encode(x, 1e9) is None and encode_in_numpy(x, 1e9) is None


def test_rows_of_nothing() -> None:
    x = torch.cat([torch.zeros(1, 9, dtype=torch.float64), torch.full((1, 9), 1e-200, dtype=torch.float64)])
    ours, oracle = library().encode(x, 1e9), encode_in_numpy(x, 1e9)
    assert ours is not None and oracle is not None and torch.equal(ours[0], oracle[0])
    assert not ours[0].any() and ours[1].flatten().tolist() == oracle[1].flatten().tolist() == [1.0, 1.0]


@given(m=st.integers(1, 5), n=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 2**32), wrong=st.booleans())
def test_wrong_rows(m: int, n: int, k: int, seed: int, wrong: bool) -> None:
    """Against Python integers and the oracle: rows made to satisfy the test, and one that does not."""
    s, t, c = random_residues(CHECKS, n, seed), random_residues(CHECKS, k, seed + 1), random_residues(m, k, seed + 2)
    z = random_residues(m, n, seed + 3)
    check = Freivalds.stored(s, t)

    def residual(i: int, row: int) -> int:
        products = [(s[i], z[row], 1), (t[i], c[row], -1)]
        return sum(sign * sum(a * b for a, b in zip(left.tolist(), right.tolist(), strict=True)) for left, right, sign in products) % P

    expected = sum(any(residual(i, row) for i in range(CHECKS)) for row in range(m))
    assert library().wrong_rows(check._test, z, c) == check.wrong_rows_in_numpy(torch.cat([z, c], dim=1)) == expected
    if not wrong:
        z, c = torch.zeros_like(z), torch.zeros_like(c)
        assert library().wrong_rows(check._test, z, c) == 0


def test_many_rows_on_several_threads() -> None:
    x, a, b = floats(300, 700, 1), random_residues(300, 700, 1), random_residues(300, 700, 2)
    ours, oracle = library().encode(x, 1e8), encode_in_numpy(x, 1e8)
    assert ours is not None and oracle is not None and torch.equal(ours[0], oracle[0]) and torch.equal(ours[1], oracle[1])
    assert torch.equal(library().add(a, b, -1), residues._wrapped(np.subtract, a, b))
    check = Freivalds.stored(random_residues(CHECKS, 400, 3), random_residues(CHECKS, 300, 4))
    z, c = random_residues(300, 400, 5), random_residues(300, 300, 6)
    assert library().wrong_rows(check._test, z, c) == 300


def test_views_are_taken_as_they_are() -> None:
    a, x = random_residues(40, 6, 1).t(), floats(20, 6, 2).t()
    assert torch.equal(library().add(a, a, 1), library().add(a.contiguous(), a.contiguous(), 1))
    ours, dense = library().encode(x, 1e8), library().encode(x.contiguous(), 1e8)
    assert ours is not None and dense is not None and torch.equal(ours[0], dense[0])


def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    a, x, alpha = random_residues(2, 6), floats(2, 6, 0), torch.ones(2, 1, dtype=torch.float64)
    test = Freivalds.stored(random_residues(CHECKS, 4), random_residues(CHECKS, 6))._test
    for b in (random_residues(2, 5), random_residues(3, 6), a.long()):
        with pytest.raises(ValueError, match="the kernel adds"):
            library().add(a, b, 1)
    for wrong in (x.float(), x[0]):
        with pytest.raises(ValueError, match="the kernel encodes"):
            library().encode(wrong, 1.0)
    for y, by in ((a.long(), alpha), (a, alpha[:1]), (a, alpha.float()), (a[0], alpha)):
        with pytest.raises(ValueError, match="the kernel decodes"):
            library().decode(y, by)
    for z, c in ((random_residues(2, 5), a), (random_residues(3, 4), a), (random_residues(2, 4), a.long()), (a, a)):
        with pytest.raises(ValueError, match="the kernel checks"):
            library().wrong_rows(test, z, c)


def test_pytorch_does_the_work_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_in_use() is library()
    monkeypatch.setenv(module.KERNELS, "torch")
    assert kernels_in_use() is None
