from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from cloven.model.shared_input import SharedInput


class Counting:
    """Three outputs, told apart by a factor, and how often they were computed."""

    def __init__(self) -> None:
        self.calls = 0
        self.lock = threading.Lock()

    def __call__(self, x: Tensor) -> list[Tensor]:
        with self.lock:
            self.calls += 1
        return [x * factor for factor in (1, 10, 100)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_siblings_compute_once_in_any_order(order: tuple[int, ...]) -> None:
    compute = Counting()
    shared, x = SharedInput(compute), torch.randn(2, 3)
    for member in order:
        assert torch.equal(shared.output(member, x), x * 10**member)
    assert compute.calls == 1


def test_another_input_is_computed_again() -> None:
    compute = Counting()
    shared = SharedInput(compute)
    for i in range(3):
        x = torch.full((1,), float(i + 1))
        assert [float(shared.output(member, x)) for member in range(3)] == [i + 1, 10 * (i + 1), 100 * (i + 1)]
    assert compute.calls == 3


def test_an_equal_but_different_tensor_is_another_input() -> None:
    """Identity, not equality: comparing contents would cost, and a pad serves one request."""
    compute = Counting()
    shared, x = SharedInput(compute), torch.ones(2)
    shared.output(0, x)
    shared.output(1, x.clone())
    assert compute.calls == 2


def test_the_same_member_twice_is_computed_twice() -> None:
    """A second call is a second forward pass; its answer must not be an old one."""
    compute = Counting()
    shared, x = SharedInput(compute), torch.ones(2)
    shared.output(0, x)
    shared.output(0, x)
    assert compute.calls == 2


def test_nothing_is_held_when_all_siblings_are_served() -> None:
    shared, x = SharedInput(Counting()), torch.ones(2)
    for member in range(3):
        shared.output(member, x)
    assert shared._local.x is None and shared._local.outputs == {}


def test_an_interrupted_group_does_not_serve_the_next_pass() -> None:
    """Between two siblings the caller gave up; a new tensor may get the old one's address."""
    compute = Counting()
    shared = SharedInput(compute)
    for i in range(50):
        assert float(shared.output(0, torch.full((1,), float(i)))) == i
    assert compute.calls == 50


def test_an_error_leaves_nothing_behind() -> None:
    def failing(x: Tensor) -> list[Tensor]:
        raise RuntimeError("once")

    shared, x = SharedInput(failing), torch.ones(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="once"):
            shared.output(0, x)


def test_threads_do_not_see_each_other() -> None:
    compute = Counting()
    shared = SharedInput(compute)
    wrong: list[int] = []
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        x = torch.full((4,), float(seed))
        for _ in range(200):
            barrier.wait(10)
            for member in range(3):
                if not torch.equal(shared.output(member, x), x * 10**member):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and compute.calls == 8 * 200
