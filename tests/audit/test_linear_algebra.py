from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from cloven.audit.linear_algebra import solve_left
from cloven.errors import RunError
from cloven.field.residues import H, P
from tests.helpers import centred

Matrix = list[list[int]]


def times(x: Matrix, a: Matrix) -> Matrix:
    """X A mod p by Python integers, centred."""
    return [[centred(sum(p * q for p, q in zip(row, column, strict=True))) for column in zip(*a, strict=True)] for row in x]


def determinant(a: Matrix) -> int:
    """By Laplace, modulo p."""
    if not a:
        return 1
    return sum((-1 if j % 2 else 1) * a[0][j] * determinant([row[:j] + row[j + 1 :] for row in a[1:]]) for j in range(len(a))) % P


def residues(matrix: Matrix) -> Tensor:
    return torch.tensor(matrix, dtype=torch.int32)


def matrices(rows: int, columns: int) -> st.SearchStrategy[Matrix]:
    numbers = st.one_of(st.integers(-H, H), st.sampled_from([0, 0, 1, -1, H, -H]))  # zeros make pivots move
    return st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows)


SYSTEMS = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda size: st.tuples(matrices(size[0], size[0]), matrices(size[1], size[0]))
)


@given(SYSTEMS)
def test_it_finds_what_was_multiplied(system: tuple[Matrix, Matrix]) -> None:
    a, x = system
    assume(determinant(a))
    found = solve_left(residues(a), residues(times(x, a)))
    assert found.dtype == torch.int64 and found.tolist() == x


@given(SYSTEMS)
def test_it_raises_exactly_where_the_determinant_is_zero(system: tuple[Matrix, Matrix]) -> None:
    a, h = system
    if determinant(a):
        assert times(solve_left(residues(a), residues(h)).tolist(), a) == h
    else:
        with pytest.raises(RunError, match="singular"):
            solve_left(residues(a), residues(h))


@pytest.mark.parametrize("a", [[[0]], [[1, 2], [2, 4]], [[0, 0], [5, 7]], [[H, 1], [-H, -1]], [[1, 2, 3], [4, 5, 6], [5, 7, 9]]])
def test_singular(a: Matrix) -> None:
    with pytest.raises(RunError, match="the matrix is singular"):
        solve_left(residues(a), residues([[1] * len(a)]))


def test_the_first_pivot_may_be_zero_and_the_arguments_stay() -> None:
    a, h = residues([[0, 1], [1, 0]]), residues([[3, 4]])
    assert solve_left(a, h).tolist() == [[4, 3]]
    assert a.tolist() == [[0, 1], [1, 0]] and h.tolist() == [[3, 4]]


def test_many_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, x = (torch.randint(-H, H + 1, (rows, 40), dtype=torch.int32, generator=generator) for rows in (40, 7))
    assert solve_left(a, residues(times(x.tolist(), a.tolist()))).tolist() == x.tolist()
