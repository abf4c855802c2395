"""Stored pads: what a copied, restored or careless store would give away, and that the real one refuses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from cloven.errors import StoreEmpty, StoreUnusable, VerificationFailed
from cloven.field.codec import encode, row_bounds
from cloven.field.freivalds import Freivalds
from cloven.field.residues import add, centre, subtract
from cloven.masks import pad_store, store_state
from cloven.masks.pad_store import PadStore
from cloven.masks.store_files import derived_key
from cloven.masks.store_state import STATE, State, StoreState
from tests.pad_stores import BACKEND, BUNDLE, CODES, SHAPES, filled, images_of, indices, opened, put_back

K = SHAPES[0][1]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    filled(tmp_path / "pads", 300).close()
    return tmp_path / "pads"


def encoded(seed: int) -> Tensor:
    """A row of activations, as it goes under a pad: int32 [1, K]."""
    x = torch.randn(1, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return encode(x, row_bounds(CODES[0]))[0]


X1, X2 = encoded(1), encoded(2)


def sent(store: PadStore, x_int: Tensor) -> Tensor:
    """What the worker receives for a row: c = x_int + m, under the store's next pad."""
    _, mask, _ = store.take(0, 1)
    return add(x_int, mask)


def attack_succeeds(c1: Tensor, c2: Tensor) -> bool:
    """The worker subtracts what it received: under one pad that is x1 − x2 exactly."""
    return torch.equal(subtract(c1, c2), subtract(X1, X2))


class NoWitness(StoreState):
    """The weakened system: nothing is known of the store outside its folder."""

    def _load(self) -> tuple[State, bool]:
        return self._parsed(self.folder / STATE), False


class NoPlace(StoreState):
    """The weakened system: a store may be anywhere, and everybody has a witness of his own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = store_state._read_identity(folder)

    def _load(self) -> tuple[State, bool]:
        return self._parsed(self.folder / STATE), False


def weakened(patch: pytest.MonkeyPatch, kind: type[StoreState]) -> None:
    patch.setattr(pad_store, "StoreState", kind)


# --- backups


def used_and_restored(folder: Path, backup: Path) -> Tensor:
    """A row is sent, some more pads are used, then the folder is put back as it was; what the worker received."""
    shutil.copytree(folder, backup)
    store = opened(folder)
    c1 = sent(store, X1)
    for _ in range(2):
        store.take(0, 60)
    store.close()
    put_back(backup, folder)
    return c1


def test_a_restored_store_without_a_witness_uses_its_pads_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weakened(monkeypatch, NoWitness)
    c1 = used_and_restored(folder, tmp_path / "backup")
    assert attack_succeeds(c1, sent(opened(folder), X2))


def test_a_restored_store_is_refused(folder: Path, tmp_path: Path) -> None:
    used_and_restored(folder, tmp_path / "backup")
    with pytest.raises(StoreUnusable, match="restored from a backup"):
        sent(opened(folder), X2)


def test_a_store_restored_after_one_commit_goes_on_behind_what_was_used(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "backup")
    c1 = sent(opened(folder), X1)
    put_back(tmp_path / "backup", folder)
    c2 = sent(opened(folder), X2)
    assert not attack_succeeds(c1, c2)
    assert len({tuple(row) for row in torch.cat([c1, c2]).tolist()}) == 2


# --- copies


def test_copies_that_are_not_bound_to_a_place_use_the_same_pads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weakened(monkeypatch, NoPlace)
    shutil.copytree(folder, tmp_path / "replica")
    assert attack_succeeds(sent(opened(folder), X1), sent(opened(tmp_path / "replica"), X2))


def test_a_copy_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "replica")
    sent(opened(folder), X1)
    with pytest.raises(StoreUnusable, match="was made elsewhere"):
        sent(opened(tmp_path / "replica"), X2)


def test_a_copy_on_another_machine_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with the witness, and with the same inode by chance."""
    sent(opened(folder), X1)
    monkeypatch.setattr(store_state, "machine_name", lambda store: "0" * 64)
    with pytest.raises(StoreUnusable, match="was made elsewhere"):
        sent(opened(folder), X2)


# --- a cursor that follows the use


def test_a_cursor_that_is_written_after_the_use_repeats_pads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def later(self: StoreState, change: Callable[[State], State]) -> State:
        state = self.read()
        return replace(change(state), generation=state.generation)  # in memory; it is to be written at the end, which never comes

    monkeypatch.setattr(pad_store, "StoreState", type("Lazy", (StoreState,), {"commit": later}))
    monkeypatch.setattr(
        "cloven.masks.store_files.GroupFiles.take", lambda self, first, rows: torch.zeros(rows, SHAPES[0][0])
    )  # no marks either
    c1 = sent(opened(folder), X1)
    assert attack_succeeds(c1, sent(opened(folder), X2))


def test_a_cursor_that_is_written_first_loses_pads_instead(folder: Path) -> None:
    c1 = sent(opened(folder), X1)  # no clean end
    assert not attack_succeeds(c1, sent(opened(folder), X2))
    assert opened(folder).status()[0].burnt == 2 * (pad_store.BLOCK - pad_store.AHEAD - 1)


def test_every_pad_of_a_store_is_used_once_by_all_who_open_it(folder: Path) -> None:
    seen = []
    with pytest.raises(StoreEmpty):
        while True:
            store = opened(folder)
            for _ in range(7):
                seen += indices(folder, 0, store.take(0, 1)[1])
            store.give_back()
    assert len(seen) == len(set(seen)) == 300


# --- the records


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8))


def test_a_nonce_that_is_a_slot_gives_the_differences_of_images(folder: Path) -> None:
    """The weakened system numbers places in a ring, not pads: two images under one keystream."""
    store = opened(folder)
    first, second = (images_of(0, store.masks(0, index, 1)).numpy().astype("<i4").tobytes() for index in (3, 3 + 128))
    cipher = AESGCM(derived_key(bytes(store._key), "records/0"))
    slots = [cipher.encrypt((3).to_bytes(12, "big"), image, b"")[: len(first)] for image in (first, second)]
    assert xor(*slots) == xor(first, second)
    record = 4 * SHAPES[0][0] + 16
    data = (folder / "group-00000-000000.pads").read_bytes()
    real = [data[record * index :][: len(first)] for index in (3, 131)]
    assert xor(*real) != xor(first, second)


def test_pads_that_are_not_checked_give_wrong_answers_silently(tmp_path: Path) -> None:
    """A fill on a broken machine wrote a wrong image; AES-GCM authenticates it all the same."""
    store = PadStore(tmp_path / "pads", BUNDLE, SHAPES)
    store.write_checks(0, lambda: (BACKEND, BACKEND.place(CODES[0])))
    images = images_of(0, store.masks(0, 0, 1))
    images[0, 2] += 1
    store.append(0, 0, images)
    _, mask, image = store.take(0, 1)
    answer = subtract(images_of(0, add(X1, mask)), image)
    assert not torch.equal(answer, images_of(0, X1)) and torch.equal(centre(answer.long() + torch.eye(6).long()[2:3]), images_of(0, X1))
    with pytest.raises(VerificationFailed):
        store.freivalds(0, 0).check(mask, image, "a stored pad")


# --- the checks


def test_a_secret_that_is_shared_by_workers_or_told_is_no_check(folder: Path) -> None:
    """Whoever knows S of one worker forges its answers; the other workers' S still refuse them."""
    store = opened(folder)
    mine, other = (store.check_number(name) for name in ("tcp://a:1", "tcp://b:1"))
    s = store._secret(mine, 0, SHAPES[0][0]).long()
    (a, b, c), (d, e, f) = (row[:3].tolist() for row in s)
    forged = images_of(0, X1).long()
    forged[0, :3] += torch.tensor([(b * f - c * e) % (2**31 - 1), (c * d - a * f) % (2**31 - 1), (a * e - b * d) % (2**31 - 1)])
    lie = centre(forged)
    assert not torch.equal(lie, images_of(0, X1))
    checks: list[Freivalds] = [store.freivalds(number, 0) for number in (mine, other)]
    checks[0].check(X1, lie, "the lie")
    with pytest.raises(VerificationFailed):
        checks[1].check(X1, lie, "the lie")
    store.drop_check("tcp://a:1")  # after the first reject
    with pytest.raises(VerificationFailed):
        store.freivalds(store.check_number("tcp://a:1"), 0).check(X1, lie, "the lie")
