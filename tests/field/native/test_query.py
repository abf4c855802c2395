"""One call against the passes that it stands for, one by one: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.codec import decode, encode_in_numpy
from cloven.field.native.library import Kernels, load_kernels
from cloven.field.native.query import answer, query
from cloven.field.residues import H, P, add, subtract
from cloven.private_lora.messages import answer_bytes, unrounded
from cloven.wire.schema import MalformedMessage
from tests.helpers import random_residues

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no compiler built the kernels")
BOUND = 1e8


def kernels() -> Kernels:
    found = load_kernels()
    assert found is not None
    return found


def numbers(seed: int, size: int, bits: int, low: int | None = None) -> memoryview:
    half = 2 ** (bits - 1)
    drawn = np.random.default_rng(seed).integers(-half if low is None else low, half, size)
    return memoryview(drawn.astype("i1" if bits == 8 else "<i2").tobytes())


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 5), k=st.integers(1, 300), pad=st.integers(0, 40), seed=st.integers(0, 99), zeros=st.booleans())
def test_queries_as_pass_by_pass(m: int, k: int, pad: int, seed: int, zeros: bool) -> None:
    x = torch.randn(m, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if zeros:
        x[-1] = 0
    mask = random_residues(m, pad + k, seed)
    found = query(kernels(), x, pad, BOUND, mask)
    encoded = encode_in_numpy(x, BOUND)
    assert found is not None and encoded is not None
    x_int, alpha = encoded
    alpha[~x_int.any(1)] = torch.inf
    assert torch.equal(found[0], add(torch.nn.functional.pad(x_int, (pad, 0)), mask)) and torch.equal(found[1], alpha)
    exact = (torch.nn.functional.pad(x_int, (pad, 0)).long() + mask.long() + H) % P - H
    assert torch.equal(found[0].long(), exact)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 5), n=st.integers(0, 40), bits=st.integers(8, 16), seed=st.integers(0, 99))
def test_answers_as_pass_by_pass(m: int, n: int, bits: int, seed: int) -> None:
    q, image = numbers(seed, m * n, bits), random_residues(m, n, seed)
    alpha = torch.rand(m, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1
    alpha[0] = torch.inf
    assert q.nbytes == answer_bytes(m, n, bits)
    y = answer(kernels(), q, bits, image, alpha)
    assert y is not None and torch.equal(y, decode(subtract(unrounded(q, m, n, bits), image), alpha))


@pytest.mark.parametrize("bits", range(9, 16))
@pytest.mark.parametrize("outside", ["low", "high"])
def test_numbers_of_more_bits(bits: int, outside: str) -> None:
    image, alpha = random_residues(2, 3, 1), torch.ones(2, 1, dtype=torch.float64)
    q = np.zeros(6, "<i2")
    q[4] = -(2 ** (bits - 1)) - 1 if outside == "low" else 2 ** (bits - 1)
    frame = memoryview(q.tobytes())
    assert answer(kernels(), frame, bits, image, alpha) is None
    with pytest.raises(MalformedMessage):
        unrounded(frame, 2, 3, bits)
    q[4] += 1 if outside == "low" else -1
    assert answer(kernels(), memoryview(q.tobytes()), bits, image, alpha) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_rows_that_are_not_finite(value: float) -> None:
    x = torch.ones(3, 40, dtype=torch.float64)
    x[1, 3] = value
    assert query(kernels(), x, 5, BOUND, random_residues(3, 45, 3)) is None


def test_many_rows() -> None:
    x, mask = torch.randn(300, 700, dtype=torch.float64), random_residues(300, 710, 3)
    found, encoded = query(kernels(), x, 10, BOUND, mask), encode_in_numpy(x, BOUND)
    assert found is not None and encoded is not None
    assert torch.equal(found[0], add(torch.nn.functional.pad(encoded[0], (10, 0)), mask))


def test_what_does_not_fit_is_refused_before_c_sees_it() -> None:
    x, mask = torch.ones(2, 30, dtype=torch.float64), random_residues(2, 35, 3)
    wrong: list[tuple[Tensor, int, Tensor]] = [
        (x.float(), 5, mask), (x, 4, mask), (x, 5, mask[:1]), (x, 5, mask.long()), (x[0], 5, mask[0]), (x[:, :29], 5, mask),
        (x[:0], 5, mask[:0]), (x, -5, mask[:, :25]),
    ]  # fmt: skip
    for rows, pad, masks in wrong:
        with pytest.raises(ValueError, match=r"do not fit|refuses"):
            query(kernels(), rows, pad, BOUND, masks)
    image, alpha, q = random_residues(2, 3, 1), torch.ones(2, 1, dtype=torch.float64), numbers(1, 6, 16)
    for frame, bits, images, scale in (
        (q[:-1], 16, image, alpha), (q, 8, image, alpha), (q, 16, image.long(), alpha), (q, 16, image[:1], alpha),
        (q, 16, image, alpha[:1]), (q, 16, image, alpha.float()), (q, 16, image, alpha[:, 0]), (q[:0], 16, image[:0], alpha[:0]),
        (q, 17, image, alpha),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"do not fit|refuses"):
            answer(kernels(), frame, bits, images, scale)


def test_views_are_read_as_they_are() -> None:
    x = torch.randn(30, 4, dtype=torch.float64).t()[:2]
    mask = random_residues(2, 70, 3)[:, ::2]
    found, dense = query(kernels(), x, 5, BOUND, mask), query(kernels(), x.contiguous(), 5, BOUND, mask.contiguous())
    assert found is not None and dense is not None and torch.equal(found[0], dense[0])
