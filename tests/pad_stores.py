"""Small pad stores, and what befalls them: for the tests of the store and the attacks on it."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cloven.bundle.durable import state_folder
from cloven.field.prg import pad_residues
from cloven.field.products import Float64, multiply
from cloven.masks.pad_store import KEY, PadStore
from cloven.masks.store_files import derived_key
from cloven.masks.store_state import STATE
from tests.helpers import CPU, random_codes

SHAPES = ((6, 10), (9, 4), (5, 7))
BUNDLE, OTHER = "ab" * 16, "cd" * 16
CODES = [random_codes(rows, columns, seed) for seed, (rows, columns) in enumerate(SHAPES)]
BACKEND = Float64(CPU)


def images_of(group: int, masks: Tensor) -> Tensor:
    """u = W m, int32 [rows, N]."""
    return multiply(BACKEND, masks, BACKEND.place(CODES[group]))


def filled(folder: Path, pads: int = 200, bundle: str = BUNDLE) -> PadStore:
    """An open store with so many pads of every group, made if there is none."""
    store = PadStore(folder, bundle, SHAPES)
    add(store, pads)
    return store


def add(store: PadStore, pads: int) -> None:
    """So many more pads of every group."""
    for group, codes in enumerate(CODES):
        store.write_checks(group, lambda codes=codes: (BACKEND, BACKEND.place(codes)))  # type: ignore[misc]
        if pads:
            first = store.filled(group)
            store.append(group, first, images_of(group, store.masks(group, first, pads)))


def opened(folder: Path, bundle: str = BUNDLE) -> PadStore:
    """The store that is there."""
    return PadStore(folder, bundle)


def masks_of(folder: Path, group: int, count: int, columns: int | None = None) -> Tensor:
    """The masks of pads 0 … count − 1, from the store's key file: what the store's owner could tell of them, and nobody else."""
    key = derived_key((folder / KEY).read_bytes(), "masks")
    return pad_residues(key, group, 0, count, columns or SHAPES[group][1])


@functools.lru_cache(maxsize=8)
def _places(key: bytes, group: int, count: int) -> dict[tuple[int, ...], int]:
    return {tuple(row): index for index, row in enumerate(pad_residues(key, group, 0, count, SHAPES[group][1]).tolist())}


def indices(folder: Path, group: int, masks: Tensor, count: int = 1500) -> list[int]:
    """Which pads these masks belong to."""
    every = _places(derived_key((folder / KEY).read_bytes(), "masks"), group, count)
    return [every[tuple(row)] for row in masks.tolist()]


def take(store: PadStore, group: int, rows: int) -> list[int]:
    """Indices of pads that are taken now; their images are right."""
    _, masks, images = store.take(group, rows)
    assert torch.equal(images, images_of(group, masks))
    return indices(store.folder, group, masks)


def witness_of(folder: Path) -> Path:
    """The witness of the store in a folder."""
    place: Path = state_folder() / "pads" / f"{json.loads((folder / 'store.json').read_bytes())['store']}.json"
    return place


def put_back(backup: Path, folder: Path) -> None:
    """A backup's contents, into the same folder, with the same inode."""
    for path in folder.iterdir():
        path.unlink()
    for path in backup.iterdir():
        shutil.copy2(path, folder / path.name, follow_symlinks=False)


class Stop(BaseException):
    """The process ends here: nothing but the test catches it."""


class Ending:
    """Ends the process at the n-th operation on the disk, before it or after it; or lets it fail.

    Args:
        patch: replaces `os.fsync`, `os.replace` and `os.posix_fallocate`.
        act: what happens there: raises, or kills.
    """

    NAMES = ("fsync", "replace", "posix_fallocate")

    def __init__(
        self, setattr_: Callable[[object, str, object], None], at: int, after: bool, act: Callable[[], None], names: Sequence[str] = NAMES
    ) -> None:
        self.count, self.reached = 0, False
        self._at, self._after, self._act = at, after, act
        for name in names:
            setattr_(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, real: Callable[..., object]) -> Callable[..., object]:
        def operation(*arguments: object, **more: object) -> object:
            here, self.count = self.count == self._at, self.count + 1
            if here and not self._after:
                self.reached = True
                self._act()
            result = real(*arguments, **more)
            if here and self._after:
                self.reached = True
                self._act()
            return result

        return operation


def stop() -> None:
    """For `Ending`."""
    raise Stop


def state_file(folder: Path) -> Path:
    """state.json."""
    return folder / STATE
