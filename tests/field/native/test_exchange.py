"""One call against the passes that it stands for, one by one: the same bits."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.codec import RowBounds, decode, encode, scale_of
from cloven.field.freivalds import CHECKS, Freivalds
from cloven.field.hadamard import Places, Units, block_of, turn, turn_onto
from cloven.field.native.exchange import Buffers, FusedExchange
from cloven.field.native.library import Kernels, load_kernels
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.field.products import multiply
from cloven.field.residues import add, subtract
from cloven.field.selection import select_backend
from tests.helpers import random_codes, random_residues

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no compiler built the kernels")


def kernels() -> Kernels:
    found = load_kernels()
    assert found is not None
    return found


def stages(count: int, n: int, seed: int) -> tuple[Places, Units]:
    random = np.random.default_rng(seed)
    gather = np.stack([random.permutation(n) for _ in range(count)]).astype(np.int32)
    return gather, random.standard_normal((count, n)).astype(np.float32)


def exchange(n: int, k: int, rounds: int = 3) -> FusedExchange:
    return FusedExchange(kernels(), stages(rounds + 1, k, 1), stages(rounds + 1, n, 2), (block_of(k), block_of(n)))


def whole(passes: FusedExchange, x: Tensor, codes: Tensor, spoil: int = 0) -> tuple[int, Tensor, Tensor]:
    """(wrong rows, what the fused calls give, what the passes give one by one)."""
    backend, bounds = select_backend("cpu"), RowBounds(2**20, 1000.0)
    w, m = backend.place(codes), len(x)
    mask, between = random_residues(m, codes.shape[1], 3), passes.buffers(m)
    between.total.copy_(torch.randn(m, len(codes)))
    image = multiply(backend, mask, w)
    check = Freivalds(SecretStream(secrets.token_bytes(KEY_BYTES), "test").residues(CHECKS, w.rows), backend, w)
    inwards, outwards = passes._held
    assert passes.ask(x, scale_of(bounds), mask, between)
    c, alpha, _, total = between
    x_int, expected_alpha = encode(torch.from_numpy(turn(x.double().numpy(), *inwards, leading=False)), bounds)
    assert torch.equal(c, add(x_int, mask)) and torch.equal(alpha, expected_alpha)
    z = multiply(backend, c, w)
    z[:spoil, 0] += 1
    out, expected = torch.full((m, len(codes)), 7.0).to(x.dtype), torch.empty(m, len(codes), dtype=x.dtype)
    wrong = passes.told(check._test, z, image, between, out)
    turn_onto(decode(subtract(z, image), alpha).numpy(), outwards, total, expected)
    return wrong, out, expected


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 5), n=st.integers(1, 300), k=st.integers(1, 300), rounds=st.integers(0, 3), half=st.booleans())
def test_the_same_bits_as_the_passes_one_by_one(m: int, n: int, k: int, rounds: int, half: bool) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16 if half else torch.float32)
    wrong, out, expected = whole(exchange(n, k, rounds), x, random_codes(n, k, 4))
    assert wrong == 0 and torch.equal(out, expected)


def test_many_rows() -> None:
    wrong, out, expected = whole(exchange(70, 600), torch.randn(300, 600), random_codes(70, 600, 4))
    assert wrong == 0 and torch.equal(out, expected)


@pytest.mark.parametrize("spoil", [1, 3])
def test_of_a_wrong_answer_nothing_is_used(spoil: int) -> None:
    wrong, out, _ = whole(exchange(30, 40), torch.randn(4, 40), random_codes(30, 40, 4), spoil)
    assert wrong == spoil and bool((out == 7.0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(value: float) -> None:
    x = torch.randn(2, 40)
    x[1, 3] = value
    passes = exchange(30, 40)
    assert not passes.ask(x, 1e6, random_residues(2, 40, 3), passes.buffers(2))


def test_what_does_not_fit_is_refused_before_c_sees_it() -> None:
    passes, x, mask = exchange(30, 40), torch.randn(2, 40), random_residues(2, 40, 3)
    for wrong_x, wrong_mask in (
        (torch.randn(2, 41), mask), (x, mask[:1]), (x.double(), mask), (x, mask.long()), (x[:, ::2], mask[:, ::2]), (x[0], mask[0]),
        (torch.randn(40, 2).t(), mask), (x[:0], mask[:0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"do not fit|refuses"):
            passes.ask(wrong_x, 1e6, wrong_mask, passes.buffers(2))
    with pytest.raises(ValueError, match="do not fit"):
        passes.ask(x, 1e6, mask, passes.buffers(3))
    z, image, alpha = random_residues(2, 30, 5), random_residues(2, 30, 6), torch.ones(2, 1, dtype=torch.float64)
    right = {"test": random_residues(2, 70, 7), "z": z, "image": image, "out": torch.zeros(2, 30)}
    asked = Buffers(mask, alpha, z, torch.zeros(2, 30))
    for name, other in (
        ("test", random_residues(2, 69, 7)), ("z", z[:1]), ("image", image.long()), ("out", torch.zeros(2, 30).double()),
        ("out", torch.zeros(30, 2).t()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            passes.told(**{**right, "asked": asked, name: other})
    for name, other in (("c", mask[:, :39]), ("alpha", alpha[:, 0]), ("alpha", alpha.float()), ("total", torch.zeros(2, 30).double())):
        with pytest.raises(ValueError, match="do not fit"):
            passes.told(**right, asked=asked._replace(**{name: other}))


def test_one_row_allocates_once_and_every_thread_has_its_own() -> None:
    small, large = exchange(30, 40), exchange(300, 400)
    one, many = small.buffers(1), small.buffers(2)
    assert [tensor.shape for tensor in many] == [(2, 40), (2, 1), (2, 30), (2, 30)] and many.total.dtype == torch.float32
    assert large.buffers(1).c.shape == (1, 400)
    again = small.buffers(1)
    assert all(a is b for a, b in zip(one, again, strict=True))  # though another group wanted more meanwhile
    assert small.buffers(2).c.data_ptr() != many.c.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(small.buffers, 1).result().c.data_ptr() != one.c.data_ptr()
    assert one.total.data_ptr() == one.z.data_ptr() + 4 * 30  # nothing lies upon another


def test_what_is_sent_shares_no_memory_with_what_is_not() -> None:
    """A frame of one group that leaves late shows c of another one at worst."""
    sent, kept = set(), set()
    for passes in (exchange(30, 400), exchange(400, 30), exchange(30, 400)):
        for rows in (1, 2):
            c, *others = passes.buffers(rows)
            sent.add(c.untyped_storage().data_ptr())
            kept |= {other.untyped_storage().data_ptr() for other in others}
    assert not sent & kept


def test_memory_that_was_first_used_in_inference_mode_serves_outside_of_it() -> None:
    with ThreadPoolExecutor(1) as pool:  # a thread without buffers

        def first() -> Tensor:
            with torch.inference_mode():
                return exchange(30, 40).buffers(1).total

        assert bool((pool.submit(first).result().zero_() == 0).all())


def test_stages_that_are_none() -> None:
    gather, units = stages(2, 8, 1)
    for wrong in (
        (gather.astype(np.int64), units),
        (gather, units.astype(np.float64)),
        (gather[:1], units),
        (gather[:, ::2], units[:, ::2]),
    ):
        with pytest.raises(ValueError, match="stages are"):
            FusedExchange(kernels(), wrong, (gather, units), (8, 8))
    gather[1, 3] = 8  # no such place
    passes = FusedExchange(kernels(), (gather, units), (gather, units), (8, 8))
    with pytest.raises(ValueError, match="refuses"):
        passes.ask(torch.randn(1, 8), 1e6, random_residues(1, 8, 3), passes.buffers(1))
    assert "secret" in repr(passes)
