from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cloven.field.hadamard as module
from cloven.field.hadamard import Rows, block_of, transform_, transform_in_numpy_, turn, turn_in_numpy, turn_onto
from cloven.field.native.library import load_kernels


def rows(m: int, n: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).standard_normal((m, n))


def hadamard(size: int) -> Rows:
    """The slow and obvious matrix."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / size**0.5


@pytest.mark.parametrize(("n", "block"), [(1, 1), (2, 2), (3, 2), (255, 128), (256, 256), (257, 256), (128_256, 256)])
def test_blocks(n: int, block: int) -> None:
    assert block_of(n) == block


@given(m=st.integers(0, 4), n=st.integers(1, 600), seed=st.integers(0, 2**32), transposed=st.booleans())
def test_against_the_matrix_and_bit_for_bit_against_numpy(m: int, n: int, seed: int, transposed: bool) -> None:
    x, block = rows(m, n, seed), block_of(n)
    matrix = np.eye(n)
    for i in range(0, n - block + 1, block):
        matrix[i : i + block] = hadamard(block) @ matrix[i : i + block]
    if n % block:
        whole = n // block * block
        spread = block - (n - whole)
        places = [*(i * whole // spread for i in range(spread)), *range(whole, n)]
        matrix[places] = hadamard(block) @ matrix[places]
    ours, oracle = x.copy(), x.copy()
    transform_(ours, transposed=transposed)
    transform_in_numpy_(oracle, block, transposed)
    assert np.array_equal(ours, oracle)
    assert np.allclose(ours, x @ (matrix if transposed else matrix.T), atol=1e-12)
    transform_(ours, transposed=not transposed)
    assert np.allclose(ours, x, atol=1e-12)


@given(m=st.integers(0, 4), n=st.integers(1, 400), stages=st.integers(1, 4), seed=st.integers(0, 2**32), leading=st.booleans())
def test_turned_as_by_single_steps(m: int, n: int, stages: int, seed: int, leading: bool) -> None:
    random = np.random.default_rng(seed)
    x, gather = rows(m, n, seed), np.stack([random.permutation(n).astype(np.int32) for _ in range(stages)])
    units = random.standard_normal((stages, n)).astype(np.float32)
    before, oracle = x.copy(), x.copy()
    for stage in range(stages):
        if stage or leading:
            transform_(oracle)
        oracle = oracle.take(gather[stage], axis=1) * units[stage].astype(np.float64)
    ours = turn(x, gather, units, leading=leading)
    assert np.array_equal(ours, oracle) and np.array_equal(ours, turn_in_numpy(x, gather, units, leading)) and np.array_equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(m=st.integers(0, 4), n=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_a_sum_in_the_dtype_of_the_model(dtype: torch.dtype, m: int, n: int, seed: int) -> None:
    """One pass gives the bits that one after the other give."""
    random = np.random.default_rng(seed)
    stages = np.stack([random.permutation(n).astype(np.int32) for _ in range(3)]), random.standard_normal((3, n)).astype(np.float32)
    x, total, out = rows(m, n, seed), torch.from_numpy(rows(m, n, seed + 1)).float(), torch.empty(m, n, dtype=dtype)
    turn_onto(x, stages, total, out)
    oracle = torch.empty(m, n, dtype=dtype).copy_(torch.from_numpy(turn_in_numpy(x, *stages, False)).add_(total))
    assert torch.equal(out, oracle)


def test_a_sum_that_is_not_a_number_or_out_of_range() -> None:
    stages = np.arange(4, dtype=np.int32)[None], np.ones((1, 4), np.float32)
    x, out = np.array([[1e300, -1e300, np.nan, 1.0]]), torch.empty(1, 4, dtype=torch.bfloat16)
    turn_onto(x, stages, torch.zeros(1, 4), out)
    assert out.isinf().tolist() == [[True, True, False, False]] and out.isnan().tolist() == [[False, False, True, False]]
    for total in (torch.zeros(1, 4, dtype=torch.float64), torch.zeros(2, 4), torch.zeros(4, 1).t()[:, ::1].expand(1, 4)[:, [0, 1, 2]]):
        with pytest.raises(ValueError, match=r"the kernel adds dense|rows of shape"):
            turn_onto(x, stages, total, out)


def test_many_rows_on_several_threads() -> None:
    x, gather = rows(300, 700), np.stack([np.random.default_rng(i).permutation(700).astype(np.int32) for i in range(3)])
    units = np.ones((3, 700), np.float32)
    assert np.array_equal(turn(x, gather, units, leading=True), turn_in_numpy(x, gather, units, True))


@pytest.mark.parametrize(
    ("x", "gather", "units"),
    [
        (np.zeros((1, 4), np.float32), np.zeros((1, 4), np.int32), np.ones((1, 4), np.float32)),
        (np.zeros((1, 4)), np.zeros((1, 4), np.int64), np.ones((1, 4), np.float32)),
        (np.zeros((1, 4)), np.zeros((0, 4), np.int32), np.ones((0, 4), np.float32)),
        (np.zeros((1, 4)), np.zeros((1, 5), np.int32), np.ones((1, 5), np.float32)),
        (np.zeros((1, 4)), np.zeros((2, 4), np.int32), np.ones((1, 4), np.float32)),
    ],
)
def test_stages_that_do_not_fit(x: Rows, gather: Any, units: Any) -> None:
    with pytest.raises(ValueError, match="stages"):
        turn(x, gather, units, leading=False)


def test_places_that_are_not_there() -> None:
    if load_kernels() is None:
        pytest.skip("no kernels were built")
    for place in (-1, 4):
        with pytest.raises(ValueError, match="the kernel refuses stages of 4 places"):
            turn(np.zeros((1, 4)), np.full((1, 4), place, np.int32), np.ones((1, 4), np.float32), leading=False)


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(2, 300)
    ours = x.copy()
    monkeypatch.setattr(module, "kernels_in_use", lambda: None)
    transform_(ours)
    monkeypatch.undo()
    transform_(x)
    assert np.array_equal(ours, x)


@pytest.mark.parametrize("bad", [np.zeros((2, 4), np.float32), np.zeros(4), np.zeros((2, 0)), np.zeros((4, 6))[:, ::2]])
def test_what_is_refused(bad: Rows) -> None:
    with pytest.raises(ValueError, match="the transform takes dense float64"):
        transform_(bad)


def test_what_the_kernel_refuses() -> None:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no kernels were built")
    for block in (0, 3, 8):
        with pytest.raises(ValueError, match=f"the kernel refuses blocks of {block} of 4"):
            kernels.hadamard(np.zeros((1, 4)), block, 1.0, False)
