"""Filling pad stores: pads of all groups, in rounds, so that an interrupted run leaves a store that is as full for every group.

One job fills one store, inside the trusted zone: it gets paths, never keys or arrays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cloven.bundle.exposed_copy import ExposedCopy
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.errors import BadInput, RunError
from cloven.field.prg import KEY_BYTES, pad_residues
from cloven.field.products import multiply
from cloven.field.selection import select_backend
from cloven.masks.pad_store import PadStore, check_bytes
from cloven.masks.store_files import record_bytes
from cloven.masks.store_state import STORE

_ROUND = 256  # pads per group and round
_BATCH_BYTES = 64 * 2**20
_SPARE_BYTES = 64 * 2**20  # of disk, left free
_TIMED_ROWS = 32
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FillJob:
    """One store to fill.

    Args:
        trusted: OUT/trusted; store: the store's folder; exposed: the trusted side's copy of OUT/exposed.
        tokens: pads that every group shall have ready.
    """

    trusted: str
    store: str
    exposed: str
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """What a fill will take.

    Args:
        tokens: pads of the group that lacks most.
        bytes: of disk, the checks of a new store included; bytes_per_token: of one pad of every group.
        seconds: about.
    """

    tokens: int
    bytes: int
    bytes_per_token: int
    seconds: float


def fill_job(trusted: Path, tokens: int, store: Path | None = None, exposed: Path | None = None) -> FillJob:
    """A job with the default places: OUT/pads and OUT/exposed.

    Raises:
        BadInput: not a positive number of tokens.
    """
    if tokens < 1:
        raise BadInput(f"{tokens} tokens: give 1 or more")
    trusted = trusted.expanduser().absolute()
    store, exposed = store or default_store(trusted), exposed or trusted.parent / "exposed"
    return FillJob(str(trusted), str(store.expanduser().absolute()), str(exposed.expanduser().absolute()), tokens)


def default_store(trusted: Path) -> Path:
    """OUT/pads, the sibling of OUT/trusted."""
    return trusted.absolute().parent / "pads"


def open_store(job: FillJob) -> PadStore:
    """The job's store, made if there is none.

    Raises:
        BadInput, StoreUnusable, ForeignBundle.
    """
    manifest = TrustedManifest.read(Path(job.trusted))
    return PadStore(Path(job.store), manifest.bundle, [(group.rows, group.columns) for group in manifest.exposed.groups])


def estimate(job: FillJob) -> Estimate:
    """What the job will take, from a product of one group that is timed now.

    Raises:
        RunError: the disk lacks the space.
    """
    manifest = TrustedManifest.read(Path(job.trusted))
    copy = ExposedCopy(Path(job.exposed), manifest)
    groups = manifest.exposed.groups
    missing, checked = [job.tokens] * len(groups), [False] * len(groups)
    if (Path(job.store) / STORE).exists():
        with contextlib.closing(open_store(job)) as store:
            missing = [max(0, job.tokens - group.left) for group in store.status()]
            checked = [store.has_checks(group) for group in range(len(groups))]
    if not any(missing):
        return Estimate(0, 0, 0, 0.0)
    size = sum(count * record_bytes(group.rows) for count, group in zip(missing, groups, strict=True))
    size += sum(check_bytes(group.columns) for group, there in zip(groups, checked, strict=True) if not there)
    free = shutil.disk_usage(next(folder for folder in (Path(job.store), *Path(job.store).parents) if folder.is_dir())).free
    if size + _SPARE_BYTES > free:
        need = f"{(size + _SPARE_BYTES) / 1e6:,.1f} MB, {_SPARE_BYTES / 1e6:.0f} MB of them to stay free"
        raise RunError(f"{job.store}: {max(missing):,} tokens need {need}; {free / 1e6:,.1f} MB are free: nothing was written")
    timed = min(range(len(groups)), key=lambda index: abs(groups[index].rows * groups[index].columns - 2**24))
    backend = select_backend("cpu")
    w = backend.place(copy.mapped(timed))
    mask = torch.zeros(_TIMED_ROWS, w.columns, dtype=torch.int32)
    multiply(backend, mask, w)
    started = time.perf_counter()
    multiply(backend, mask, w)
    per_product = (time.perf_counter() - started) / (_TIMED_ROWS * w.rows * w.columns)
    products = sum(count * group.rows * group.columns for count, group in zip(missing, groups, strict=True))
    started = time.perf_counter()
    pad_residues(secrets.token_bytes(KEY_BYTES), 0, 0, _TIMED_ROWS, w.columns)
    per_number = (time.perf_counter() - started) / (_TIMED_ROWS * w.columns)  # of a mask; encrypting an image takes about as long
    numbers = sum(count * (group.rows + group.columns) for count, group in zip(missing, groups, strict=True))
    commits = sum(-(-count // _ROUND) for count in missing) + checked.count(False)
    seconds = per_product * products + per_number * numbers + commits * _commit_seconds(Path(job.store)) + size / 5e8
    return Estimate(max(missing), size, sum(record_bytes(group.rows) for group in groups), seconds)


def _commit_seconds(store: Path) -> float:
    """How long this disk takes to make a batch of pads durable: three files and their folders, synced."""
    folder = next(folder for folder in (store, *store.parents) if folder.is_dir())
    started = time.perf_counter()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".cloven-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return 0.0  # whoever fills will say what is wrong
    return 6 * (time.perf_counter() - started)


def fill(job: FillJob) -> None:
    """Fill one store."""
    for _ in fill_rounds(job):
        pass


@torch.no_grad()
def fill_rounds(job: FillJob) -> Iterator[tuple[int, int]]:
    """Fill one store; yields pads made and to be made, over all groups, after every batch.

    Raises:
        RunError: the disk is full: what was written is kept.  TamperedBundle: the copy of exposed/ was altered.
        VerificationFailed: a pad was computed wrongly; it was not written.
    """
    manifest = TrustedManifest.read(Path(job.trusted))
    copy = ExposedCopy(Path(job.exposed), manifest)
    backend = select_backend("cpu")
    with contextlib.closing(open_store(job)) as store, store.filling():
        everything = range(len(manifest.exposed.groups))
        for group in everything:
            store.write_checks(group, lambda group=group: (backend, backend.place(copy.verified(group))))  # type: ignore[misc]
        status = store.status()
        missing = [max(0, job.tokens - one.left) for one in status]
        firsts = [one.filled for one in status]
        made, total = 0, sum(missing)
        while any(missing):
            level = max(0, max(missing) - _ROUND)  # groups that are ahead wait for the others
            for group in everything:
                rows = min(missing[group] - level, max(1, _BATCH_BYTES // (4 * manifest.exposed.groups[group].rows)))
                if rows <= 0:
                    continue
                mask = store.masks(group, firsts[group], rows)
                image = multiply(backend, mask, backend.place(copy.mapped(group))).cpu()
                store.freivalds(0, group).check(mask, image, f"a pad made for group {group}")
                store.append(group, firsts[group], image)
                firsts[group] += rows
                missing[group] -= rows
                made += rows
                yield made, total
        store.drop_used_files()
