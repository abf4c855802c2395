"""The queue of pads, whatever makes them; `test_one_time` and `test_lwe` have the two kinds."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.errors import PadMisuse, RunError
from cloven.masks.waiting import Pads, WaitingPads

K, N = 3, 2


class Numbered(WaitingPads):
    """Pad i is (i, i, i), its image (−i, −i)."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int]] = []
        self.failing = False

    def _make(self, first: int, rows: int) -> tuple[Tensor, Tensor]:
        if self.failing:
            raise RunError("no pads today")
        self.batches.append((first, rows))
        numbers = torch.arange(first, first + rows, dtype=torch.int32)[:, None]
        return numbers.repeat(1, K), -numbers.repeat(1, N)


def numbers_of(pads: Pads) -> list[int]:
    """The pads' numbers; mask and image must belong together."""
    mask = pads.mask(torch.zeros(pads.rows, K, dtype=torch.int32))
    image = pads.unmask(torch.zeros(pads.rows, N, dtype=torch.int32))
    assert (mask == mask[:, :1]).all() and (image == mask[:, :1]).all()  # 0 − (−i)
    return [int(number) for number in mask[:, 0]]


STEPS = st.lists(st.tuples(st.sampled_from(["take", "fill", "forget"]), st.integers(0, 9)), max_size=25)


@given(STEPS)
def test_no_pad_is_handed_out_twice(steps: list[tuple[str, int]]) -> None:
    source = Numbered()
    taken: list[int] = []
    for step, rows in steps:
        ready = source.ready
        if step == "take":
            pads = source.take(rows)
            assert pads.rows == rows
            numbers = numbers_of(pads)
            assert not rows or numbers[0] == pads.first
            taken += numbers
            assert source.ready == max(0, ready - rows)
        elif step == "fill":
            assert source.fill(rows) == max(0, rows - ready)
            assert source.ready == max(rows, ready)
        else:
            source.forget()
            assert source.ready == 0
    assert taken == sorted(set(taken))
    made = [first for first, _ in source.batches]
    assert made == sorted(made) and source.made == sum(rows for _, rows in source.batches)


def test_what_waits_goes_out_first() -> None:
    source = Numbered()
    source.fill(3)
    source.fill(5)
    assert numbers_of(source.take(4)) == [0, 1, 2, 3]
    assert numbers_of(source.take(3)) == [4, 5, 6]
    assert source.batches == [(0, 3), (3, 2), (5, 2)]


def test_statistics_count_rows_made() -> None:
    source = Numbered()
    source.fill(4)
    source.take(6)
    assert source.made == 6 and source.seconds >= 0


def test_a_batch_that_failed_is_burnt() -> None:
    source = Numbered()
    source.fill(2)
    source.failing = True
    with pytest.raises(RunError, match="no pads today"):
        source.fill(5)
    with pytest.raises(RunError):
        source.take(4)
    source.failing = False
    assert source.made == 2
    assert not set(numbers_of(source.take(3))) & {0, 1, 2, 3, 4}  # the two that waited went with the take that failed


def test_forgotten_pads_never_come_back() -> None:
    source = Numbered()
    source.fill(5)
    source.forget()
    assert numbers_of(source.take(2)) == [5, 6]


def test_eight_threads_and_a_filler() -> None:
    source, stop = Numbered(), threading.Event()
    taken: list[list[int]] = [[] for _ in range(8)]

    def take(worker: int) -> None:
        for i in range(40):
            taken[worker] += numbers_of(source.take(1 + (worker + i) % 4))

    def fill() -> None:
        while not stop.is_set():
            source.fill(7)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(8)]
    filler = threading.Thread(target=fill)
    for thread in (filler, *threads):
        thread.start()
    for thread in threads:
        thread.join(30)
    stop.set()
    filler.join(10)
    everything = [number for part in taken for number in part]
    assert len(everything) == sum(1 + (w + i) % 4 for w in range(8) for i in range(40)) == len(set(everything))


def test_once_only() -> None:
    pads = Numbered().take(2)
    with pytest.raises(PadMisuse, match="after it has masked"):
        pads.unmask(torch.zeros(2, N, dtype=torch.int32))
    pads = Numbered().take(2)
    pads.mask(torch.zeros(2, K, dtype=torch.int32))
    with pytest.raises(PadMisuse, match="masks once"):
        pads.mask(torch.zeros(2, K, dtype=torch.int32))
    pads.unmask(torch.zeros(2, N, dtype=torch.int32))
    with pytest.raises(PadMisuse, match="unmasks once"):
        pads.unmask(torch.zeros(2, N, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(1, K), (3, K), (2, 1), (2, K + 1)])
def test_a_refused_shape_burns_the_pad(shape: tuple[int, int]) -> None:
    pads = Numbered().take(2)
    with pytest.raises(PadMisuse, match="cannot mask rows of shape"):
        pads.mask(torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(PadMisuse, match="masks once"):
        pads.mask(torch.zeros(2, K, dtype=torch.int32))


def test_an_answer_of_another_shape_is_refused() -> None:
    pads = Numbered().take(2)
    pads.mask(torch.zeros(2, K, dtype=torch.int32))
    with pytest.raises(PadMisuse, match="cannot unmask rows of shape"):
        pads.unmask(torch.zeros(1, N, dtype=torch.int32))


def test_neither_copied_nor_pickled_nor_shown() -> None:
    source = Numbered()
    for secret in (source, source.take(3)):
        for copier in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(PadMisuse):
                copier(secret)
    assert repr(Numbered().take(3)) == "Pads(first=0, rows=3, <secret>)"


_FORK = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking a process that has threads: the very thing tried here
import torch
from cloven.errors import PadMisuse
from tests.masks.test_waiting import Numbered, numbers_of

source = Numbered()
source.fill(4)
unused = source.take(1)
child = os.fork()
if child == 0:
    failures = [] if source.ready == 0 and not source._ready else ["pads are there"]
    for name, attempt in {"take": lambda: source.take(1), "mask": lambda: unused.mask(torch.zeros(1, 3, dtype=torch.int32))}.items():
        try:
            attempt()
            failures.append(name)
        except PadMisuse:
            pass
    print("child", failures, flush=True)
    os._exit(bool(failures))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("parent", numbers_of(unused), numbers_of(source.take(4)))
"""


def test_a_forked_child_has_no_pads(pytestconfig: pytest.Config) -> None:
    result = subprocess.run([sys.executable, "-c", _FORK], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["child []", "parent [0] [1, 2, 3, 4]"], result.stdout + result.stderr
