from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cloven.field.residues import H, P, add, centre, is_residue, subtract

BELOW = st.integers(1 - 2**60, 2**60 - 1)
RESIDUE = st.integers(-H, H) | st.sampled_from([-H, -H + 1, -1, 0, 1, H - 1, H])


def test_p_is_prime_and_h_its_half() -> None:
    assert P == 2**31 - 1
    assert all(P % d for d in range(2, 46341))  # √p < 46341
    assert 2 * H + 1 == P


@given(st.lists(BELOW, min_size=1, max_size=20))
def test_centre_reduces_what_is_below_2_to_the_60(values: list[int]) -> None:
    result = centre(torch.tensor(values, dtype=torch.int64))
    assert result.dtype == torch.int32
    for value, residue in zip(values, result.tolist(), strict=True):
        assert -H <= residue <= H
        assert (value - residue) % P == 0


def test_centre_at_the_edges() -> None:
    edges = [
        base + d
        for base in (0, H, -H, P, -P, 2**31, -(2**31), 2**32, -(2**32), 2**59, -(2**59), P * 2**20, 2**60 - 3, 3 - 2**60)
        for d in (-2, -1, 0, 1, 2)
    ]
    edges += [k * P + d for k in (2**28, -(2**28), H >> 1, -(H >> 1)) for d in (H, -H, H + 1, -H - 1)]
    edges += [2**60 - 1, 1 - 2**60]
    result = centre(torch.tensor(edges, dtype=torch.int64)).tolist()
    assert result == [(value + H) % P - H for value in edges]


def test_centre_keeps_the_shape() -> None:
    assert centre(torch.zeros(2, 3, 4, dtype=torch.int64)).shape == (2, 3, 4)
    assert centre(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)


@given(st.lists(st.tuples(RESIDUE, RESIDUE), min_size=1, max_size=20))
def test_addition_and_subtraction(pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor(values, dtype=torch.int32) for values in zip(*pairs, strict=True))
    before = a.clone(), b.clone()
    assert add(a, b).dtype == subtract(a, b).dtype == torch.int32
    assert add(a, b).tolist() == [(x + y + H) % P - H for x, y in pairs]
    assert subtract(a, b).tolist() == [(x - y + H) % P - H for x, y in pairs]
    assert torch.equal(a, before[0])  # arguments are left alone
    assert torch.equal(b, before[1])


def test_is_residue() -> None:
    assert is_residue(torch.tensor([[-H, 0, H]], dtype=torch.int32))
    assert is_residue(torch.zeros(0, 5, dtype=torch.int32))
    for outside in (H + 1, -H - 1, 2**31 - 1, -(2**31)):
        assert not is_residue(torch.tensor([0, outside, 0], dtype=torch.int32))
