from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from cloven.errors import PadMisuse, VerificationFailed
from cloven.field.prg import pad_residues
from cloven.field.products import Float64, PlacedMatrix
from cloven.field.residues import H, is_residue
from cloven.masks import one_time
from cloven.masks.one_time import OneTimePads, PadKey, Pads
from tests.helpers import CPU, centred, pads_of, python_product, random_codes, random_residues, verifier

N, K = 6, 10
W = random_codes(N, K)


class RecordingKey(PadKey):
    """A key that remembers which indices it was asked for, and can show a pad."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[int, int, int]] = []

    def residues(self, group: int, first: int, rows: int, width: int) -> Tensor:
        self.ranges.append((group, first, rows))
        return super().residues(group, first, rows, width)

    def pad(self, group: int, index: int) -> Tensor:
        return pad_residues(self._key, group, index, 1, K)[0]


def masks_of(pads: Pads) -> list[tuple[int, ...]]:
    """The masks themselves: masking zeros shows them."""
    return [tuple(row) for row in pads.mask(torch.zeros(pads.rows, K, dtype=torch.int32)).tolist()]


def test_mask_then_unmask_gives_the_product() -> None:
    x_int = torch.randint(-(2**20), 2**20, (5, K), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    pads = pads_of(W).take(5)
    c = pads.mask(x_int)
    assert c.dtype == torch.int32
    assert is_residue(c)
    assert not torch.equal(c, x_int)
    product = pads.unmask(python_product(c, W))
    assert torch.equal(product, python_product(x_int, W))  # no wrap: |W x| < H here


def test_masking_is_addition_in_the_field() -> None:
    key = RecordingKey()
    x_int = torch.tensor([[H, -H, 0, 1, -1] * 2], dtype=torch.int32)
    c = pads_of(W, group=9, key=key).take(1).mask(x_int)
    assert c[0].tolist() == [centred(x + m) for x, m in zip(x_int[0].tolist(), key.pad(9, 0).tolist(), strict=True)]


def test_masks_once() -> None:
    pads = pads_of(W).take(2)
    pads.mask(torch.zeros(2, K, dtype=torch.int32))
    with pytest.raises(PadMisuse, match="masks once"):
        pads.mask(torch.ones(2, K, dtype=torch.int32))


def test_unmasks_once() -> None:
    pads = pads_of(W).take(2)
    z = python_product(pads.mask(torch.zeros(2, K, dtype=torch.int32)), W)
    pads.unmask(z)
    with pytest.raises(PadMisuse, match="unmasks once"):
        pads.unmask(z)


def test_never_unmasks_before_masking() -> None:
    pads = pads_of(W).take(1)
    with pytest.raises(PadMisuse, match="after it has masked"):
        pads.unmask(torch.zeros(1, N, dtype=torch.int32))


@pytest.mark.parametrize(("pad_rows", "x_rows"), [(1, 5), (5, 1), (4, 3)])
def test_one_row_is_one_pad(pad_rows: int, x_rows: int) -> None:
    # broadcasting would put several rows under one pad, silently: the difference of the rows would be sent in the clear
    pads = pads_of(W).take(pad_rows)
    with pytest.raises((PadMisuse, ValueError)):
        pads.mask(torch.zeros(x_rows, K, dtype=torch.int32))


def test_the_width_must_be_the_pads() -> None:
    with pytest.raises((PadMisuse, ValueError)):
        pads_of(W).take(2).mask(torch.zeros(2, 1, dtype=torch.int32))


def test_accounting() -> None:
    key = RecordingKey()
    source = pads_of(W, group=4, key=key)
    assert source.ready == 0
    assert source.fill(8) == 8
    assert source.fill(8) == 0  # there already
    assert source.fill(5) == 0
    assert source.ready == 8
    first = source.take(3)  # a part of the batch
    assert (first.first, first.rows, source.ready) == (0, 3, 5)
    second = source.take(7)  # what is left, and two made now
    assert (second.first, second.rows, source.ready) == (3, 7, 0)
    assert source.fill(4) == 4
    source.forget()
    assert source.ready == 0
    third = source.take(1)
    assert third.first == 14  # forgotten pads are burnt
    assert key.ranges == [(4, 0, 8), (4, 8, 2), (4, 10, 4), (4, 14, 1)]
    expected = [tuple(key.pad(4, i).tolist()) for i in (*range(10), 14)]
    assert masks_of(first) + masks_of(second) + masks_of(third) == expected


def test_pads_from_a_queue_unmask_rightly() -> None:
    source = pads_of(W)
    source.fill(2)
    source.fill(5)
    for rows in (1, 3, 4):
        x_int = torch.randint(-1000, 1000, (rows, K), dtype=torch.int32, generator=torch.Generator().manual_seed(rows))
        pads = source.take(rows)
        assert torch.equal(pads.unmask(python_product(pads.mask(x_int), W)), python_product(x_int, W))


@pytest.mark.parametrize("rounds", [40, pytest.param(1500, marks=pytest.mark.long)])
def test_no_pad_twice_under_eight_threads(rounds: int) -> None:
    key = RecordingKey()
    source = pads_of(W, key=key, backend=Float64(CPU))
    taken: list[list[tuple[int, ...]]] = [[] for _ in range(8)]
    stop = threading.Event()

    def take(worker: int) -> None:
        for i in range(rounds):
            pads = source.take(1 + (worker + i) % 5)
            assert pads.rows == 1 + (worker + i) % 5
            taken[worker] += masks_of(pads)

    def fill() -> None:
        while not stop.is_set():
            source.fill(6)

    filler = threading.Thread(target=fill)
    threads = [threading.Thread(target=take, args=(i,)) for i in range(8)]
    for thread in (filler, *threads):
        thread.start()
    for thread in threads:
        thread.join(120)
    stop.set()
    filler.join(10)

    masks = [mask for of_one in taken for mask in of_one]
    assert len(masks) == sum(1 + (w + i) % 5 for w in range(8) for i in range(rounds))
    assert len(set(masks)) == len(masks)
    covered: set[int] = set()
    for _, first, rows in key.ranges:
        assert covered.isdisjoint(range(first, first + rows))
        covered.update(range(first, first + rows))
    known = {tuple(key.pad(0, index).tolist()) for index in covered}
    assert known.issuperset(masks)


class Lying(Float64):
    """A back end, memory or disk that is wrong in one element."""

    def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        parts = super().parts(c, w)
        parts[-1, -1, -1] += 1
        return parts


def test_a_bad_product_is_caught_when_the_pad_is_made() -> None:
    key = RecordingKey()
    source = OneTimePads(2, key, lambda: Lying(CPU).place(W), Lying(CPU), verifier(W), "model.layers.3.q_proj")
    with pytest.raises(VerificationFailed, match=r"pad made for model\.layers\.3\.q_proj is wrong in 1 of 4"):
        source.fill(4)
    assert source.ready == 0
    with pytest.raises(VerificationFailed):
        source.take(2)
    assert key.ranges == [(2, 0, 4), (2, 4, 2)]  # burnt, not tried again


def test_an_altered_matrix_is_caught_when_the_pad_is_made() -> None:
    # S·W was made from verified bytes; the memory map that pads are made from changed afterwards
    altered = W.clone()
    altered[1, 1] += 1
    backend = Float64(CPU)
    source = OneTimePads(0, PadKey(), lambda: backend.place(altered), backend, verifier(W), "layer")
    with pytest.raises(VerificationFailed):
        source.take(1)


def test_indices_end_before_they_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_time, "_LAST_INDEX", 5)
    source = pads_of(W)
    source.take(5)
    with pytest.raises(PadMisuse, match="used up"):
        source.take(1)


def test_a_destroyed_key_makes_no_pads() -> None:
    key = PadKey()
    source = pads_of(W, key=key)
    source.fill(2)
    key.destroy()
    source.take(2)  # made before
    with pytest.raises(PadMisuse):
        source.take(1)


def test_keys_differ_and_reprs_hide_everything() -> None:
    a, b = PadKey(), PadKey()
    assert not torch.equal(a.residues(0, 0, 1, K), b.residues(0, 0, 1, K))
    pads = pads_of(W, key=a).take(1)
    assert repr(a) == "PadKey(<secret>)"
    assert repr(pads) == "Pads(first=0, rows=1, <secret>)"
    assert bytes(a._key).hex() not in repr(vars(pads)) + repr(a)


def test_taking_no_rows_is_harmless() -> None:
    pads = pads_of(W).take(0)
    assert pads.mask(torch.zeros(0, K, dtype=torch.int32)).shape == (0, K)
    assert pads.unmask(torch.zeros(0, N, dtype=torch.int32)).shape == (0, N)


_FORK = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking a process that has threads: the very thing tried here
import torch
from cloven.errors import PadMisuse
from cloven.masks.one_time import PadKey
from tests.helpers import pads_of, python_product, random_codes

w = random_codes(6, 10)
key = PadKey()
source = pads_of(w, key=key)
source.fill(4)
unused, masked = source.take(1), source.take(1)
c = masked.mask(torch.zeros(1, 10, dtype=torch.int32))
zeros = torch.zeros(1, 10, dtype=torch.int32)

child = os.fork()
if child == 0:
    attempts = {
        "take": lambda: source.take(1),
        "fill": lambda: source.fill(3),
        "mask": lambda: unused.mask(zeros),
        "unmask": lambda: masked.unmask(torch.zeros(1, 6, dtype=torch.int32)),
        "residues": lambda: key.residues(0, 0, 1, 10),
    }
    failures = []
    for name, attempt in attempts.items():
        try:
            attempt()
            failures.append(name)
        except PadMisuse:
            pass
    if any(key._key):
        failures.append("the key is there")
    if source.ready or source._ready:
        failures.append("pads are there")
    print("child", failures, flush=True)
    os._exit(bool(failures))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
x_int = torch.arange(20, dtype=torch.int32).view(2, 10)
pads = source.take(2)
assert torch.equal(pads.unmask(python_product(pads.mask(x_int), w)), python_product(x_int, w))
assert not masked.unmask(python_product(c, w)).any()
assert any(key._key)
print("parent goes on")
"""


def test_a_forked_child_has_no_pads(pytestconfig: pytest.Config) -> None:
    # in a process of its own: forking pytest itself would duplicate its threads and buffers
    result = subprocess.run([sys.executable, "-c", _FORK], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == ["child []", "parent goes on"]


def test_masked_rows_look_alike_whatever_x_is() -> None:
    # not a proof (that is AES's), a guard against forgetting to add the mask: mean and spread of c do not follow x
    source = pads_of(random_codes(1, 4096), backend=Float64(CPU))
    for x in (0, 1, H, -H):
        c = source.take(8).mask(torch.full((8, 4096), x, dtype=torch.int32)).to(torch.float64)
        assert abs(float(c.mean())) < 0.02 * H
        assert abs(float(c.std()) / H - 3**-0.5) < 0.01


def test_random_residues_helper_covers_the_field() -> None:
    values = random_residues(100, 1000)
    assert is_residue(values)
    assert int(values.max()) > 0.999 * H and int(values.min()) < -0.999 * H


def test_pads_and_keys_are_neither_copied_nor_pickled() -> None:
    key = PadKey()
    source = pads_of(W, key=key)
    for secret in (source.take(1), key, source):
        for copier in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(PadMisuse):
                copier(secret)


def test_a_key_destroyed_in_the_middle_never_gives_zero_key_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may close the session between the check of the key and its use: the checked copy is what is used."""
    key = PadKey()
    used: list[bytes] = []

    def destroy_then_expand(secret: bytes, *arguments: int) -> torch.Tensor:
        key.destroy()
        used.append(bytes(secret))
        return pad_residues(secret, *arguments)

    monkeypatch.setattr(one_time, "pad_residues", destroy_then_expand)
    key.residues(0, 0, 1, 4)
    assert any(used[0])
    with pytest.raises(PadMisuse, match="destroyed"):
        key.residues(0, 1, 1, 4)
