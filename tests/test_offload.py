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
from cloven.errors import (
    BudgetExhausted,
    ClovenError,
    ForeignBundle,
    PadMisuse,
    PeerRefused,
    RunError,
    SessionClosed,
    VerificationFailed,
    WorkerRefused,
    WorkerTimeout,
    WorkerUnreachable,
)
from cloven.field.codec import encode, row_bounds
from cloven.field.freivalds import Freivalds
from cloven.field.residues import is_residue
from cloven.masks.one_time import Pads
from cloven.offload import Share
from cloven.wire.channel import Channel, Exchanger
from tests.helpers import (
    Context,
    HonestExchanger,
    centred,
    offloaded,
    pads_of,
    python_product,
    random_codes,
    serving,
    verifier,
    write_exposed,
)

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

    def multiply(
        self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None], into: Tensor | None = None
    ) -> Tensor:
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

    def multiply(
        self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None], into: Tensor | None = None
    ) -> Tensor:
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


# --- rows at several workers, and replicas


class Seat:
    """A holder with as many workers as it is given; who failed, and how."""

    def __init__(self, codes: Tensor, *channels: HonestExchanger) -> None:
        self.channels = list(channels)
        self.checks = [verifier(codes) for _ in channels]
        self.position = 0
        self.moved: list[ClovenError] = []

    def current(self, group: int) -> tuple[HonestExchanger, Freivalds]:
        del group
        return self.channels[self.position], self.checks[self.position]

    def move(self, gone: Exchanger, error: ClovenError) -> None:
        if gone is not self.channels[self.position]:
            return
        self.moved.append(error)
        if self.position + 1 == len(self.channels):
            raise error
        self.position += 1


class Failing(HonestExchanger):
    """A channel that raises: when it is asked, or instead of an answer, after the trusted work."""

    def __init__(self, codes: Tensor, error: ClovenError, late: bool = True) -> None:
        super().__init__(codes)
        self.error, self.late = error, late

    def multiply(
        self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None], into: Tensor | None = None
    ) -> Tensor:
        self.seen.append(c.clone())
        if self.late:
            meanwhile()
        raise self.error


LOST = [WorkerUnreachable("gone"), WorkerTimeout("silent")]


def matrix_of(*seats: tuple[int, Seat], masks: CountingPads | None = None) -> offload.OffloadedMatrix:
    shares = tuple(Share(rows, seat) for rows, seat in seats)
    return offload.OffloadedMatrix("layer", 0, 6, 20, row_bounds(W), masks or CountingPads(W), shares)


def exact(x: Tensor) -> Tensor:
    x_int, alpha = encode(x, row_bounds(W))
    return python_product(x_int, W).to(torch.float64) / alpha


@pytest.mark.parametrize("cuts", [[6], [1, 5], [4, 2], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_rows_at_several_workers(cuts: list[int]) -> None:
    """The same c for all of them, one pad, and the trusted work once, after the last one was asked."""
    channels = [HonestExchanger(codes) for codes in W.split(cuts)]
    seats = [Seat(codes, channel) for codes, channel in zip(W.split(cuts), channels, strict=True)]
    masks = CountingPads(W)
    asked: list[list[int]] = []
    x = activations(3)
    y = matrix_of(*zip(cuts, seats, strict=True), masks=masks).product(x, lambda: asked.append([len(one.seen) for one in channels]))
    assert torch.equal(y, exact(x))
    assert asked == [[1] * len(cuts)] and masks.taken == [3]
    assert all(torch.equal(one.seen[0], channels[0].seen[0]) for one in channels)


@pytest.mark.parametrize("error", LOST, ids=["unreachable", "timeout"])
@pytest.mark.parametrize("late", [True, False])
def test_a_replica_gets_fresh_pads(error: ClovenError, late: bool) -> None:
    dead, alive, masks = Failing(W, error, late), HonestExchanger(W), CountingPads(W)
    seat, calls = Seat(W, dead, alive), [0]
    matrix = matrix_of((6, seat), masks=masks)
    x = activations(4)

    def work() -> None:
        calls[0] += 1

    assert torch.equal(matrix.product(x, work), exact(x))
    assert calls == [1] and masks.taken == [4, 4] and seat.moved == [error]
    assert int((dead.seen[0] == alive.seen[0]).sum()) < 3  # independent masks: not "the same" x under the same pad, nor the same c
    assert torch.equal(matrix.product(x, work), exact(x))
    assert calls == [2] and len(dead.seen) == 1  # it stays with the replica


def test_workers_that_greet_and_never_answer_do_not_use_up_pads_for_ever() -> None:
    """Two of them would hand a product to each other: every move costs pads, out of a store that others need."""

    class Circle(Seat):
        def move(self, gone: Exchanger, error: ClovenError) -> None:
            self.moved.append(error)

    seat, masks = Circle(W, Failing(W, WorkerTimeout("silent"))), CountingPads(W)
    with pytest.raises(WorkerTimeout, match="silent"):
        matrix_of((6, seat), masks=masks).product(activations(2))
    assert len(seat.moved) == offload.MOST_MOVES and masks.taken == [2] * (offload.MOST_MOVES + 1)


@pytest.mark.parametrize("error", LOST, ids=["unreachable", "timeout"])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_who_is_blamed(broken: int, error: ClovenError) -> None:
    """Of three workers with rows one fails: its seat moves, and only that; all are asked again, with the same new c."""
    pieces = W.split(2)
    channels = [Failing(piece, error) if number == broken else HonestExchanger(piece) for number, piece in enumerate(pieces)]
    replicas = [HonestExchanger(piece) for piece in pieces]
    seats = [Seat(piece, *both) for piece, *both in zip(pieces, channels, replicas, strict=True)]
    masks, calls = CountingPads(W), [0]
    x = activations(2)

    def work() -> None:
        calls[0] += 1

    assert torch.equal(matrix_of(*((2, seat) for seat in seats), masks=masks).product(x, work), exact(x))
    assert [seat.moved for seat in seats] == [[error] if number == broken else [] for number in range(3)]
    assert masks.taken == [2, 2] and calls == [1]
    new = replicas[broken].seen[0]
    for number, channel in enumerate(channels):
        if number != broken:
            assert len(channel.seen) == 2 and torch.equal(channel.seen[1], new)
            assert int((channel.seen[0] == new).sum()) < 3
            assert torch.equal(channel.seen[0], channels[broken].seen[0])


def test_one_after_the_other_fails() -> None:
    """The inner one, then the outer one, then the inner one's replica: as many pads as tries."""
    first, second = W.split(3)
    outer = Seat(first, Failing(first, LOST[1]), HonestExchanger(first))
    inner = Seat(second, Failing(second, LOST[0]), Failing(second, LOST[0]), HonestExchanger(second))
    masks, calls = CountingPads(W), [0]
    x = activations(2)

    def work() -> None:
        calls[0] += 1

    assert torch.equal(matrix_of((3, outer), (3, inner), masks=masks).product(x, work), exact(x))
    assert masks.taken == [2] * 4 and calls == [1]
    seen = [c for seat in (outer, inner) for channel in seat.channels for c in channel.seen]
    assert len({row.numpy().tobytes() for c in seen for row in c}) == 2 * 4


@pytest.mark.parametrize("error", LOST, ids=["unreachable", "timeout"])
def test_all_dead(error: ClovenError) -> None:
    seat, masks = Seat(W, Failing(W, LOST[0]), Failing(W, error)), CountingPads(W)
    with pytest.raises(type(error)) as caught:
        matrix_of((6, seat), masks=masks).product(activations(2))
    assert caught.value is error and masks.taken == [2, 2]


def test_one_worker_without_a_replica_is_asked_once() -> None:
    channel, masks = Failing(W, LOST[0]), CountingPads(W)
    with pytest.raises(WorkerUnreachable) as caught:
        offloaded(W, channel, masks=masks).product(activations(2))
    assert caught.value is LOST[0] and len(channel.seen) == 1 and masks.taken == [2]


@pytest.mark.parametrize("error", [WorkerRefused("no group 7"), BudgetExhausted("no"), ForeignBundle("another"), PeerRefused("key")])
@pytest.mark.parametrize("broken", [0, 1])
def test_no_failover_after_a_refusal(error: ClovenError, broken: int) -> None:
    pieces = W.split(3)
    replicas = [HonestExchanger(piece) for piece in pieces]
    seats = [
        Seat(piece, Failing(piece, error) if number == broken else HonestExchanger(piece), replicas[number])
        for number, piece in enumerate(pieces)
    ]
    masks = CountingPads(W)
    with pytest.raises(type(error)) as caught:
        matrix_of(*((3, seat) for seat in seats), masks=masks).product(activations(2))
    assert caught.value is error and masks.taken == [2]
    assert not any(seat.moved for seat in seats) and not any(replica.seen for replica in replicas)


@pytest.mark.parametrize("broken", [0, 1])
def test_no_failover_after_a_wrong_answer(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unmasked: list[Tensor] = []
    monkeypatch.setattr(Pads, "unmask", lambda _self, z: unmasked.append(z))
    pieces = W.split(3)
    replicas = [HonestExchanger(piece) for piece in pieces]
    seats = [
        Seat(piece, Wrong(piece) if number == broken else HonestExchanger(piece), replicas[number]) for number, piece in enumerate(pieces)
    ]
    masks = CountingPads(W)
    with pytest.raises(VerificationFailed, match=r"layer: the worker's answer is wrong in 1 of 2 rows"):
        matrix_of(*((3, seat) for seat in seats), masks=masks).product(activations(2))
    assert masks.taken == [2] and unmasked == []
    assert not any(seat.moved for seat in seats) and not any(replica.seen for replica in replicas)


def test_a_lie_at_one_worker_counts_although_another_one_is_dead() -> None:
    """The inner worker lies, the outer one never answers: the lie is known first, and it ends the session."""
    pieces = W.split(3)
    outer, inner = Seat(pieces[0], Failing(pieces[0], LOST[0]), HonestExchanger(pieces[0])), Seat(pieces[1], Wrong(pieces[1]))
    with pytest.raises(VerificationFailed):
        matrix_of((3, outer), (3, inner)).product(activations(2))
    assert outer.moved == []


def test_answers_of_swapped_workers_are_refused() -> None:
    """The right product of the wrong rows."""
    pieces = W.split(3)
    seats = [Seat(pieces[0], HonestExchanger(pieces[1])), Seat(pieces[1], HonestExchanger(pieces[0]))]
    with pytest.raises(VerificationFailed):
        matrix_of(*((3, seat) for seat in seats)).product(activations(2))


def test_a_connection_that_another_thread_closed_is_asked_again() -> None:
    """While this thread was waiting for the connection, another one moved the seat and closed it."""
    seat = Seat(W, Failing(W, SessionClosed("closed"), late=False), HonestExchanger(W))

    class Moved(Seat):
        def current(self, group: int) -> tuple[HonestExchanger, Freivalds]:
            now = super().current(group)
            if not self.position:
                self.position = 1  # just after it was asked for
            return now

    seat.__class__ = Moved
    masks, x = CountingPads(W), activations(2)
    assert torch.equal(matrix_of((6, seat), masks=masks).product(x), exact(x))
    assert seat.moved == [] and masks.taken == [2, 2]


def test_an_error_of_the_trusted_work_is_nobodys_death() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    seat = Seat(W, HonestExchanger(W), HonestExchanger(W))
    with pytest.raises(ZeroDivisionError):
        matrix_of((6, seat)).product(activations(2), fail)
    assert seat.moved == []


def test_long_batches_over_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that were answered are not asked again."""
    monkeypatch.setattr(offload, "rows_per_exchange", lambda columns, rows: 3)

    class DiesAtTheSecond(HonestExchanger):
        def multiply(
            self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None], into: Tensor | None = None
        ) -> Tensor:
            z = super().multiply(layer, group, c, columns_out, meanwhile)
            if len(self.seen) == 2:
                raise LOST[0]
            return z

    dying, alive, masks = DiesAtTheSecond(W), HonestExchanger(W), CountingPads(W)
    x = activations(8)
    y = matrix_of((6, Seat(W, dying, alive)), masks=masks).product(x)
    assert torch.allclose(y, exact(x)) and masks.taken == [3, 3, 3, 2]
    assert [c.shape[0] for c in dying.seen + alive.seen] == [3, 3, 3, 2]
