"""Pads of a store, as a session takes them: checked, each once, and what happens when there are none."""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cloven.errors import PadMisuse, SessionClosed, StoreEmpty, StoreUnusable, VerificationFailed
from cloven.masks import stored_pads
from cloven.masks.pad_store import PadStore
from cloven.masks.stored_pads import StoredPads
from cloven.masks.waiting import Pads
from tests.helpers import python_product, random_residues
from tests.pad_stores import BUNDLE, CODES, SHAPES, add, filled, images_of, indices, opened

K = SHAPES[0][1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(stored_pads, "_POLL_SECONDS", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> PadStore:
    """20 pads of every group."""
    return filled(tmp_path / "pads", 20)


Spare = Callable[[int], tuple[Tensor, Tensor]]


def source(store: PadStore, on_empty: str = "fail", spare: Spare | None = None, ended: Callable[[], bool] = lambda: False) -> StoredPads:
    return StoredPads(store, 0, store.freivalds(0, 0), "layer", on_empty, spare, ended)


def taken(store: PadStore, pads: Pads) -> list[int]:
    """Which pads of the store these are: masking zeros shows the masks."""
    masks = pads.mask(torch.zeros(pads.rows, K, dtype=torch.int32))
    assert torch.equal(pads.unmask(images_of(0, masks)), torch.zeros(pads.rows, SHAPES[0][0], dtype=torch.int32))
    return indices(store.folder, 0, masks)


def test_the_product_comes_out(store: PadStore) -> None:
    x_int = torch.randint(-(2**20), 2**20, (3, K), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    pads = source(store).take(3)
    c = pads.mask(x_int)
    assert torch.equal(pads.unmask(python_product(c, CODES[0])), python_product(x_int, CODES[0]))


def test_in_order_from_the_queue_and_past_it(store: PadStore) -> None:
    pads = source(store)
    assert pads.fill(8) == 8 and pads.ready == 8 and pads.fill(8) == 0
    assert taken(store, pads.take(3)) == [0, 1, 2] and taken(store, pads.take(7)) == list(range(3, 10))
    assert pads.ready == 0 and pads.made == 10 and taken(store, pads.take(1)) == [10]


def test_two_sources_of_one_store(store: PadStore) -> None:
    first, second = source(store), source(opened(store.folder), "fail")
    store.give_back()
    got = [index for _ in range(3) for one in (first, first) for index in taken(store, one.take(2))]
    assert got == list(range(12))
    with pytest.raises(StoreEmpty):  # the rest is in the first one's block
        second.take(1)


def test_no_more_is_read_ahead_than_there_is(store: PadStore) -> None:
    pads = source(store)
    assert pads.fill(50) == 20 and pads.fill(50) == 0 and store.left(0) == 0
    assert taken(store, pads.take(20)) == list(range(20))


def test_somebody_else_takes_what_was_to_be_read_ahead(store: PadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pads = source(store)
    monkeypatch.setattr(store, "left", lambda group: 30)
    assert pads.fill(30) == 0
    monkeypatch.undo()


def test_dry_and_fail(store: PadStore) -> None:
    pads = source(store)
    pads.take(18)
    with pytest.raises(StoreEmpty, match="2 pads are left of group 0, 3 are needed: run `cloven pads fill`"):
        pads.take(3)
    assert taken(store, pads.take(2)) == [18, 19]
    with pytest.raises(StoreEmpty):
        pads.take(1)
    add(opened(store.folder), 5)
    assert taken(store, pads.take(5)) == list(range(20, 25))


def test_dry_and_wait_until_somebody_fills_it(store: PadStore, caplog: pytest.LogCaptureFixture) -> None:
    pads, got = source(store, "wait"), []
    pads.take(20)
    waiting = threading.Thread(target=lambda: got.extend(taken(store, pads.take(2))))
    with caplog.at_level(logging.WARNING):
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not got
        add(opened(store.folder), 1)
        waiting.join(0.2)
        assert waiting.is_alive()  # one is not enough, and is not used
        add(opened(store.folder), 5)
        waiting.join(10)
    assert got == [20, 21]
    assert [record.getMessage() for record in caplog.records] == [
        f"layer: waiting until somebody fills the pad store {store.folder}"  # once
    ]


def test_the_session_ends_while_it_waits(store: PadStore) -> None:
    ended = threading.Event()
    pads = source(store, "wait", ended=ended.is_set)
    pads.take(20)
    threading.Timer(0.1, ended.set).start()
    started = time.monotonic()
    with pytest.raises(SessionClosed, match="has ended while it waited for pads"):
        pads.take(1)
    assert time.monotonic() - started < 5


def test_dry_and_compute(store: PadStore) -> None:
    asked = []

    def spare(rows: int) -> tuple[Tensor, Tensor]:
        asked.append(rows)
        masks = random_residues(rows, K, seed=rows)
        return masks, images_of(0, masks)

    pads = source(store, "compute", spare)
    assert taken(store, pads.take(19)) == list(range(19)) and asked == []
    pads.fill(4)  # reads what there is, and computes nothing ahead
    assert pads.ready == 1
    both = pads.take(3)
    c = both.mask(torch.zeros(3, K, dtype=torch.int32))
    assert indices(store.folder, 0, c[:1]) == [19] and torch.equal(c[1:], random_residues(2, K, seed=2)) and asked == [2]
    assert torch.equal(both.unmask(images_of(0, c)), torch.zeros(3, 6, dtype=torch.int32))
    add(store, 5)
    assert taken(store, pads.take(5)) == list(range(20, 25))


def test_a_wrong_pad_in_the_store_is_found(tmp_path: Path) -> None:
    """Written by a fill with a broken kernel that did not check: encrypted and authenticated, and wrong all the same."""
    store = PadStore(tmp_path / "pads", BUNDLE, SHAPES)
    add(store, 0)
    images = images_of(0, store.masks(0, 0, 4))
    images[2, 3] ^= 1
    store.append(0, 0, images)
    pads = source(store)
    assert taken(store, pads.take(2)) == [0, 1]
    with pytest.raises(VerificationFailed, match="a stored pad for layer is wrong in 1 of 2 rows; nothing of it was used"):
        pads.take(2)
    assert store.status()[0].burnt + store.status()[0].used == 4


def test_a_damaged_record_reaches_whoever_needs_it(store: PadStore) -> None:
    (path,) = store.folder.glob("group-00000-*.pads")
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    pads = source(store)
    with pytest.raises(StoreUnusable, match="pad 0 is not what was written"):
        pads.fill(4)


def test_a_forked_child_has_no_pads(store: PadStore) -> None:
    pads = source(store)
    pads.fill(4)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pads.take(1)
        except PadMisuse:
            code = 0 if pads.ready == 0 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert taken(store, pads.take(4)) == [0, 1, 2, 3]


def test_pads_are_not_copied(store: PadStore) -> None:
    with pytest.raises(PadMisuse):
        copy.copy(source(store))
