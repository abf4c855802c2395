from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven import offload
from cloven.errors import PadMisuse, RunError, VerificationFailed, WorkerTimeout
from cloven.field.codec import encode, row_bounds
from cloven.field.residues import is_residue
from cloven.masks.one_time import Pads
from cloven.wire.channel import Channel
from tests.helpers import Context, HonestExchanger, centred, offloaded, pads_of, python_product, random_codes, serving, write_exposed

W = random_codes(6, 20)


def activations(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class CountingPads:
    """A mask source that counts what was taken."""

    def __init__(self, codes: Tensor) -> None:
        self._source = pads_of(codes)
        self.taken: list[int] = []

    def take(self, rows: int) -> Pads:
        self.taken.append(rows)
        return self._source.take(rows)


def test_the_product_is_that_of_the_encoded_rows_bit_for_bit() -> None:
    x = activations(5)
    y = offloaded(W, HonestExchanger(W)).product(x)
    x_int, alpha = encode(x, row_bounds(W))
    assert y.dtype == torch.float64
    assert torch.equal(y, python_product(x_int, W).to(torch.float64) / alpha)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e4, 1e30])
def test_the_error_bound_of_the_docstring(scale: float) -> None:
    x = activations(7) * scale
    x[3] *= 1e4
    y = offloaded(W, HonestExchanger(W)).product(x)
    _, alpha = encode(x, row_bounds(W))
    bound = 0.5 * W.to(torch.float64).abs().sum(1) / alpha  # ½‖W_j‖₁/α
    assert bool(((y - x @ W.to(torch.float64).t()).abs() <= bound * (1 + 1e-6)).all())


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_any_shape(m: int, n: int, k: int, seed: int) -> None:
    codes = random_codes(n, k, seed)
    x = torch.randn(m, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = offloaded(codes, HonestExchanger(codes)).product(x)
    exact = x @ codes.to(torch.float64).t()
    assert torch.allclose(y, exact, rtol=1e-5, atol=1e-5 * float(1 + exact.abs().max()))


def test_zero_rows_are_masked_like_any_other() -> None:
    channel = HonestExchanger(W)
    x = activations(3)
    x[1] = 0
    y = offloaded(W, channel).product(x)
    assert not y[1].any()
    assert int((channel.seen[0][1] == 0).sum()) < 3  # what left is uniform, not zero


def test_only_masked_residues_leave() -> None:
    channel = HonestExchanger(W)
    matrix = offloaded(W, channel)
    x = activations(4)
    matrix.product(x)
    matrix.product(x)  # the same rows again: another pad
    first, second = channel.seen
    assert is_residue(first)
    assert is_residue(second)
    x_int, _ = encode(x, row_bounds(W))
    for c in (first, second):
        assert int((c == x_int).sum()) < 3
    assert int((first == second).sum()) < 3


def test_long_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "rows_per_exchange", lambda columns, rows: 3 if (columns, rows) == (20, 6) else 0)
    channel, masks = HonestExchanger(W), CountingPads(W)
    calls: list[int] = []
    x = activations(8)
    y = offloaded(W, channel, masks=masks).product(x, lambda: calls.append(1))
    assert [c.shape[0] for c in channel.seen] == [3, 3, 2]
    assert masks.taken == [3, 3, 2]
    assert calls == [1]  # the trusted work is done once
    assert torch.allclose(y, x @ W.to(torch.float64).t(), atol=1e-4)


def test_no_rows() -> None:
    channel = HonestExchanger(W)
    y = offloaded(W, channel).product(torch.empty(0, 20, dtype=torch.float64))
    assert y.shape == (0, 6)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_costs_no_pad_and_sends_nothing(bad: float) -> None:
    channel, masks = HonestExchanger(W), CountingPads(W)
    x = activations(3)
    x[2, 7] = bad
    with pytest.raises(RunError):
        offloaded(W, channel, masks=masks).product(x)
    assert masks.taken == []
    assert channel.seen == []


class Silent(HonestExchanger):
    """A channel whose answers are lost."""

    def multiply(self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None]) -> Tensor:
        super().multiply(layer, group, c, columns_out, meanwhile)
        raise WorkerTimeout("no answer")


def test_a_pad_whose_answer_is_lost_is_burnt() -> None:
    channel, masks = Silent(W), CountingPads(W)
    matrix = offloaded(W, channel, masks=masks)
    x = activations(2)
    for _ in range(2):
        with pytest.raises(WorkerTimeout):
            matrix.product(x)
    assert masks.taken == [2, 2]
    assert int((channel.seen[0] == channel.seen[1]).sum()) < 3  # "the same" x is never sent under the same pad


class Wrong(HonestExchanger):
    """A channel to a worker that is wrong by one, once."""

    def multiply(self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None]) -> Tensor:
        z = super().multiply(layer, group, c, columns_out, meanwhile)
        z[0, 0] = centred(int(z[0, 0]) + 1)
        return z


def test_a_wrong_answer_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    unmasked: list[Tensor] = []
    monkeypatch.setattr(Pads, "unmask", lambda _self, z: unmasked.append(z))
    with pytest.raises(VerificationFailed, match=r"layer: the worker's answer is wrong in 1 of 3 rows"):
        offloaded(W, Wrong(W)).product(activations(3))
    assert unmasked == []


def test_no_secret_in_the_repr() -> None:
    text = repr(offloaded(W, HonestExchanger(W)))
    assert "<secret>" in text
    assert "tensor" not in text


def test_a_reused_pad_object_is_refused() -> None:
    class Reusing:
        def __init__(self) -> None:
            self.pads = pads_of(W).take(2)

        def take(self, rows: int) -> Pads:
            assert rows == self.pads.rows
            return self.pads

    matrix = offloaded(W, HonestExchanger(W), masks=Reusing())
    matrix.product(activations(2))
    with pytest.raises(PadMisuse):
        matrix.product(activations(2, seed=1))


def test_through_a_real_worker(tmp_path: Path, context: Context) -> None:
    groups = [W, random_codes(11, 20, seed=4)]
    manifest = write_exposed(tmp_path / "exposed", groups)
    with serving(tmp_path / "exposed", "inproc://w", context=context):
        channel = Channel("inproc://w", bytes.fromhex(manifest.bundle), timeout=10, context=context)
        x = activations(9)
        for number, codes in enumerate(groups):
            y = offloaded(codes, channel, group=number).product(x)
            assert torch.allclose(y, x @ codes.to(torch.float64).t(), atol=1e-4)
        channel.close()
    record = channel.telemetry.layers()["layer"]
    assert (record.exchanges, record.rows) == (2, 18)
