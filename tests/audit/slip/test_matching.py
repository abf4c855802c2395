from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.audit.slip.matching import (
    Known,
    aligned_to,
    assigned,
    by_graph,
    by_known,
    by_profiles,
    cosines,
    doubly_stochastic,
    profiles,
    spread_evenly,
)
from cloven.errors import BadInput


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * (1 + torch.arange(columns) / columns)


@given(seed=st.integers(0, 2**16), rows=st.integers(2, 12), columns=st.integers(40, 90))
def test_profiles_keep_under_permutations_and_signs(seed: int, rows: int, columns: int) -> None:
    x, coin = gaussian(rows, columns, seed), torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, (rows, columns), generator=coin) - 1
    scrambled = (x * signs)[:, torch.randperm(columns, generator=coin)]
    assert torch.allclose(profiles(3 * scrambled), profiles(x), atol=1e-5)
    order = torch.randperm(rows, generator=coin)
    assert torch.equal(by_profiles(scrambled[order], x), order)


def test_graphs_keep_under_a_common_permutation_and_signs() -> None:
    x, coin = gaussian(30, 50, 1), torch.Generator().manual_seed(2)
    order, columns = torch.randperm(30, generator=coin), torch.randperm(50, generator=coin)
    signs = 2 * torch.randint(0, 2, (30, 1), generator=coin) - 1
    assert torch.equal(by_graph((signs * x)[order][:, columns], x), order)
    assert torch.allclose(cosines(x).diagonal(), torch.ones(30), atol=1e-5)


def test_a_basis_and_row_scales_do_not_matter() -> None:
    """What full logits give: lm_head up to a basis."""
    x, coin = gaussian(60, 8, 3), torch.Generator().manual_seed(4)
    order = torch.randperm(60, generator=coin)
    mixed = (torch.rand(60, 1, generator=coin) + 0.5) * x @ torch.randn(8, 8, generator=coin)
    even = spread_evenly(mixed)
    assert torch.allclose(even.norm(dim=1), torch.ones(60), atol=1e-5)
    assert torch.equal(by_graph(spread_evenly(mixed[order]), spread_evenly(x)), order)
    assert float((by_graph(spread_evenly(gaussian(60, 8, 9)), even) == torch.arange(60)).double().mean()) < 0.2


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_rows_columns_and_signs_are_aligned_together(noise: float) -> None:
    x, coin = gaussian(60, 50, 5), torch.Generator().manual_seed(6)
    rows, columns = torch.randperm(60, generator=coin), torch.randperm(50, generator=coin)
    signs = [2 * torch.randint(0, 2, size, generator=coin) - 1 for size in ((60, 1), (1, 50))]
    scrambled = (signs[0] * signs[1] * x)[rows][:, columns] + noise * torch.randn(60, 50, generator=coin)
    found = aligned_to(scrambled, x)
    assert torch.equal(found.rows, rows) and torch.equal(found.columns, columns)
    assert float(torch.nn.functional.cosine_similarity(found.applied(scrambled).flatten(), x.flatten(), dim=0)) > 0.95


def test_soft_permutations_find_what_profiles_do_not() -> None:
    x, coin = torch.randn(90, 80, generator=torch.Generator().manual_seed(7)), torch.Generator().manual_seed(8)
    rows, columns = torch.randperm(90, generator=coin), torch.randperm(80, generator=coin)
    noisy = x[rows][:, columns] + 0.2 * torch.randn(90, 80, generator=coin)
    assert float((by_profiles(noisy, x) == rows).double().mean()) < 0.5
    assert torch.equal(aligned_to(noisy, x).rows, rows)


def test_nothing_is_aligned_where_nothing_is_alike() -> None:
    found = aligned_to(gaussian(60, 50, 1), gaussian(60, 50, 2))
    assert sorted(found.rows.tolist()) == list(range(60)) and sorted(found.columns.tolist()) == list(range(50))
    assert float((found.rows == torch.arange(60)).double().mean()) < 0.2


@pytest.mark.parametrize("given", [0, 12])
def test_a_few_known_vectors_give_the_others(given: int) -> None:
    coin = torch.Generator().manual_seed(3)
    basis = torch.randn(120, 40, generator=coin)
    a, b = (basis @ torch.randn(40, 200, generator=coin) for _ in range(2))  # one geometry, other coordinates
    order, signs = torch.randperm(120, generator=coin), 2.0 * torch.randint(0, 2, (120,), generator=coin) - 1
    scrambled = signs[:, None] * b[order]
    places, ways = order.argsort(), signs[order.argsort()]
    match = by_known(a, scrambled, Known(torch.arange(given), places[:given], ways[:given]))
    found = float((match == places)[given:].double().mean())
    assert found > 0.95 if given else found < 0.1


def test_rows_and_columns_sum_to_one() -> None:
    soft = doubly_stochastic(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(soft.sum(0), torch.ones(40), atol=1e-4) and torch.allclose(soft.sum(1), torch.ones(40), atol=1e-2)
    assert bool((soft >= 0).all())


def test_the_best_assignment() -> None:
    assert assigned(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).tolist() == [0, 1]
    assert assigned(torch.tensor([[1.0, 2.0], [3.0, 3.5]])).tolist() == [1, 0]


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(BadInput, match=r"need SciPy: pip install 'cloven\[audit\]'"):
        assigned(torch.eye(2))
