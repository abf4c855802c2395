"""A store of pads on disk, made in advance: each used once, whatever happens to the processes that use it.

    pads fill        u = W m for pads filled … of every group, checked, encrypted, fsync, then `filled` is committed
    take             1. reserve: commit cursor + block for all groups, before any of these pads is read
                     2. read the records, destroy them, check S u = (S W) m
                     3. hand out, in order

A pad is burnt before it is used: a process that is killed between 1 and 3 loses what it had reserved, at most a block (or what one call
asked for), and no other process ever gets the same index: two processes share a store without overlap. The store carries what is needed to
check answers, S·W for some workers: a machine with a filled store needs no copy of the exposed matrices.

Guarantee: no index is handed out twice by the store in its place; copies, restored backups and other machines' stores are refused (see
`store_state`). Assumes that the disk keeps what fsync promised. Not hidden: how many pads were used. Not detected: a machine whose whole
disk is rolled back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from cloven.bundle.durable import PARTIAL, read_small, write_durably
from cloven.errors import BadInput, PadMisuse, RunError, StoreEmpty, StoreUnusable
from cloven.field.freivalds import CHECKS, Freivalds, image_of
from cloven.field.prg import KEY_BYTES, SecretStream, pad_residues
from cloven.field.products import Backend, PlacedMatrix
from cloven.masks.store_files import SEGMENT, TAG_BYTES, GroupFiles, derived_key
from cloven.masks.store_state import LOCK, STATE, STORE, State, StoreState, locked

BLOCK = 50  # pads of a group that a process which is killed may lose, besides those that are being sent
AHEAD = 2  # of them read ahead: a pad that was read is used up, also where the session ends without it
_RESERVED = BLOCK - AHEAD  # and of them reserved, not read yet
_KEPT = 4 * SEGMENT  # burnt pads whose files stay: another process may not have read what it has reserved
WORKERS = 16  # secrets S of a store, one per worker; number 0 checks the pads themselves
KEY, FILLING, CACHE_TAG = "key", "filling", "CACHEDIR.TAG"
_FIRST_FILES = (KEY, CACHE_TAG, LOCK, STATE, STORE, FILLING)  # what an interrupted creation leaves; a new key replaces the old one
_CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# pads must never be restored from a backup\n"  # backup programs know it


@dataclass(frozen=True)
class GroupStatus:
    """Pads of one group: made, handed out, reserved but never handed out (lost, or about to be used), tried twice, and left."""

    filled: int
    used: int
    burnt: int
    reused: int
    left: int


class PadStore:
    """An open store.

    Args:
        folder: the store.
        bundle: the id of the bundle that it must be for.
        create: the groups' shapes [N, K], to make the store where there is none.

    Raises:
        StoreUnusable, ForeignBundle: see `store_state`.
    """

    def __init__(self, folder: Path, bundle: str, create: Sequence[tuple[int, int]] | None = None) -> None:
        if create is not None and not (folder / STORE).exists():
            _create(folder, bundle, tuple(create))
        self.folder = folder
        self._state = StoreState(folder)
        self._state.require_bundle(bundle)
        self._key = bytearray(_read_key(folder / KEY))
        self.groups = self._state.identity.groups
        self._files = [GroupFiles(folder, bundle, group, rows, bytes(self._key)) for group, (rows, _) in enumerate(self.groups)]
        self._reserved = [(0, 0)] * len(self.groups)  # next and end of what this process may use
        self._lock = threading.Lock()
        self._pid = os.getpid()
        _live_stores.add(self)

    def __repr__(self) -> str:
        return f"PadStore({self.folder}, <secret>)"

    def filled(self, group: int) -> int:
        """Pads made so far."""
        return self._state.read().filled[group]

    def left(self, group: int) -> int:
        """Pads that this process could take now."""
        state = self._state.read()
        with self._lock:
            own, end = self._reserved[group]
        return state.filled[group] - state.cursor[group] + end - own

    def fewest_left(self) -> int:
        """The same, of the group that has fewest.

        Raises:
            StoreUnusable: see `StoreState`.
        """
        state = self._state.read()
        with self._lock:
            reserved = [end - own for own, end in self._reserved]
        return min(filled - cursor + own for filled, cursor, own in zip(state.filled, state.cursor, reserved, strict=True))

    def masks(self, group: int, first: int, rows: int) -> Tensor:
        """The masks of pads first …, int32 [rows, K]."""
        return pad_residues(derived_key(self._require_owner(), "masks"), group, first, rows, self.groups[group][1])

    def append(self, group: int, first: int, images: Tensor) -> None:
        """Add the images of pads first …, int32 [rows, N], durably.

        Raises:
            RunError: the disk is full, or somebody else has filled the same pads meanwhile.
        """
        self._require_owner()
        self._files[group].append(first, images)

        def advanced(state: State) -> State:
            if state.filled[group] != first:
                raise RunError(f"{self.folder}: another `cloven pads fill` is at work")
            return replace(state, filled=_with(state.filled, group, first + images.shape[0]))

        self._state.commit(advanced)

    def take(self, group: int, rows: int) -> tuple[int, Tensor, Tensor]:
        """Pads that nobody had before: index of the first, masks int32 [rows, K], images int32 [rows, N]. Not yet checked.

        Raises:
            StoreEmpty: there are not that many; none was used.  StoreUnusable, PadMisuse: the store is not what it should be.
        """
        self._require_owner()
        with self._lock:
            pieces = self._pieces(group, rows)
            masks = [self.masks(group, first, count) for first, count in pieces]
            images = [self._files[group].take(first, count) for first, count in pieces]
        return pieces[0][0], torch.cat(masks), torch.cat(images)

    def freivalds(self, number: int, group: int) -> Freivalds:
        """The check with secret number `number`, from the S·W that the store carries."""
        rows, columns = self.groups[group]
        aad = bytes.fromhex(self._state.identity.bundle) + group.to_bytes(4, "big") + number.to_bytes(4, "big")
        nonce = group.to_bytes(4, "big") + number.to_bytes(8, "big")
        key = self._require_owner()
        path = self._checks_path(group)
        size = check_bytes(columns) // WORKERS
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                file.seek(number * size)
                plain = AESGCM(derived_key(key, "checks")).decrypt(nonce, file.read(size), aad)
        except (OSError, InvalidTag, ValueError) as error:
            raise StoreUnusable(f"{path}: the checks cannot be read or were altered; remove the store and fill a new one") from error
        image = torch.from_numpy(np.frombuffer(plain, dtype="<i4").astype(np.int32).reshape(CHECKS, columns))
        return Freivalds.stored(self._secret(number, group, rows), image)

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Held by the one process that fills the store.

        Raises:
            RunError: there is another one.
        """
        try:
            with locked(self.folder, FILLING, wait=False):
                yield
        except BlockingIOError as error:
            raise RunError(f"{self.folder}: another `cloven pads fill` is at work") from error

    def write_checks(self, group: int, verified: Callable[[], tuple[Backend, PlacedMatrix]]) -> None:
        """Compute S·W of all secrets from the verified W of a group, once.

        Raises:
            RunError: the disk is full.
        """
        if self.has_checks(group):
            return
        key = self._require_owner()
        backend, w = verified()
        cipher, bundle = AESGCM(derived_key(key, "checks")), bytes.fromhex(self._state.identity.bundle)
        records = []
        for number in range(WORKERS):
            image = image_of(self._secret(number, group, w.rows), backend, w)
            aad = bundle + group.to_bytes(4, "big") + number.to_bytes(4, "big")
            records.append(cipher.encrypt(group.to_bytes(4, "big") + number.to_bytes(8, "big"), image.numpy().astype("<i4").tobytes(), aad))
        try:
            write_durably(self._checks_path(group), b"".join(records))
        except OSError as error:
            raise RunError(f"{self.folder}: the checks of group {group} cannot be written: {error.strerror}") from error

    def has_checks(self, group: int) -> bool:
        """Whether `write_checks` has been there."""
        return self._checks_path(group).exists()

    def check_number(self, worker: str) -> int:
        """The number of a worker's own secret S: the same for the same worker, until it is dropped.

        Raises:
            BadInput: all are used up.
        """
        state = self._state.read()
        if not worker:  # "" marks what was dropped
            raise BadInput("a worker without an address has no secret of its own")

        def added(state: State) -> State:
            if worker in state.checks:
                return state
            if len(state.checks) >= WORKERS - 1:
                raise BadInput(f"{self.folder}: serves {WORKERS - 1} workers, and these are used up; remove the store and fill a new one")
            return replace(state, checks=(*state.checks, worker))

        if worker not in state.checks:
            state = self._state.commit(added)
        return 1 + state.checks.index(worker)

    def drop_check(self, worker: str) -> None:
        """Never use a worker's secret S again: it was rejected once, and every reject tells a little of S."""
        self._state.commit(lambda now: replace(now, checks=tuple("" if name == worker else name for name in now.checks)))

    def drop_used_files(self) -> None:
        """Remove files all of whose pads are burnt."""
        state = self._state.read()
        for files, cursor in zip(self._files, state.cursor, strict=True):
            files.drop_before(cursor - _KEPT)

    def give_back(self) -> None:
        """Return what this process has reserved and not read, where nobody has reserved more since; for a clean end.

        The ranges are forgotten here before the cursor is committed, so that they cannot be used by both. A forked child gives back
        nothing: what it remembers is its parent's.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            reserved, self._reserved = self._reserved, [(0, 0)] * len(self.groups)
        if any(own < end for own, end in reserved):

            def returned(state: State) -> State:
                pairs = zip(state.cursor, reserved, strict=True)
                return replace(state, cursor=tuple(own if own < end == cursor else cursor for cursor, (own, end) in pairs))

            self._state.commit(returned)

    def status(self) -> list[GroupStatus]:
        """Counts, by group."""
        state = self._state.read()
        result = []
        for files, filled, cursor in zip(self._files, state.filled, state.cursor, strict=True):
            used, reused = files.counts(filled)
            result.append(GroupStatus(filled, used, cursor - used, reused, filled - cursor))
        return result

    def close(self) -> None:
        """Overwrite the key and unmap the files."""
        self.forget_keys()
        with self._lock:
            for files in self._files:
                files.close()

    def forget_keys(self) -> None:
        """Overwrite the key; nothing can be taken any more."""
        self._key[:] = bytes(KEY_BYTES)
        for files in self._files:
            files.forget_key()

    def _pieces(self, group: int, rows: int) -> list[tuple[int, int]]:
        """Ranges of indices that belong to this process alone."""
        pieces, missing = [], rows
        own, end = self._reserved[group]
        if end - own < rows:
            start = self._reserve(group, rows - (end - own), end - own)
            if own < end:
                pieces.append((own, end - own))
                missing -= end - own
            own = start
            end = self._reserved[group][1]
        pieces.append((own, missing))
        self._reserved[group] = (own + missing, end)
        return pieces

    def _reserve(self, group: int, rows: int, rest: int) -> int:
        """Commit the reservation of at least `rows` pads of a group, and refill the blocks of the others on the way; where it begins.

        Args:
            rest: pads that this process has reserved already, for the error.
        """
        begun: dict[int, int] = {}

        def advanced(state: State) -> State:
            begun.clear()
            cursor = list(state.cursor)
            if state.filled[group] - cursor[group] < rows:
                left = state.filled[group] - cursor[group] + rest
                raise StoreEmpty(f"{self.folder}: {left} pads are left of group {group}, {rows + rest} are needed: run `cloven pads fill`")
            begun[group] = cursor[group]
            cursor[group] += min(max(rows, _RESERVED), state.filled[group] - cursor[group])
            for other in range(len(cursor)):  # groups that are used alike run out together: one commit serves all
                own, end = self._reserved[other]
                if other != group and own > 0 and end - own < _RESERVED // 2 and end in (own, cursor[other]):
                    begun[other] = own if end > own else cursor[other]
                    cursor[other] += min(_RESERVED - (end - own), state.filled[other] - cursor[other])
            return replace(state, cursor=tuple(cursor))

        state = self._state.commit(advanced)
        for one, first in begun.items():
            self._reserved[one] = (first, state.cursor[one])
        return begun[group]

    def _secret(self, number: int, group: int, rows: int) -> Tensor:
        return SecretStream(self._require_owner(), f"pads/freivalds/{number}/{group}").residues(CHECKS, rows)

    def _checks_path(self, group: int) -> Path:
        return self.folder / f"group-{group:05d}.checks"

    def _require_owner(self) -> bytes:
        key = bytes(self._key)  # one copy is tested and used: another thread may destroy the key at any moment
        if os.getpid() != self._pid or not any(key):
            raise PadMisuse("the pad store is closed, or this process was forked: open a session of its own")
        return key


_live_stores: weakref.WeakSet[PadStore] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for store in list(_live_stores):
        store._lock = threading.Lock()  # a thread that was not forked may hold it
        store._reserved = [(0, 0)] * len(store.groups)
        store.forget_keys()


os.register_at_fork(after_in_child=_forget_after_fork)


def check_bytes(columns: int) -> int:
    """Disk space of one group's checks, K = `columns`."""
    return WORKERS * (4 * CHECKS * columns + TAG_BYTES)


def _with(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _create(folder: Path, bundle: str, groups: tuple[tuple[int, int], ...]) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder):
            if (folder / STORE).exists():  # somebody else was quicker
                return
            if any(path.name.removesuffix(PARTIAL) not in _FIRST_FILES for path in folder.iterdir()):
                raise BadInput(f"{folder}: holds other files; choose another --store, or remove them first")
            write_durably(folder / KEY, secrets.token_bytes(KEY_BYTES))
            write_durably(folder / CACHE_TAG, _CACHE_TAG.encode())
            StoreState.create(folder, bundle, groups)
    except OSError as error:
        raise BadInput(f"{folder}: the store cannot be made there: {error.strerror}") from error


def _read_key(path: Path) -> bytes:
    try:
        status = path.lstat()
        if status.st_mode & 0o077 or status.st_uid != os.getuid():
            raise StoreUnusable(f"{path}: others can read the key, or it is somebody else's; remove the store and fill a new one")
        key = read_small(path, KEY_BYTES)
    except (OSError, ValueError) as error:
        raise StoreUnusable(f"{path}: the key cannot be read; remove the store and fill a new one") from error
    if len(key) != KEY_BYTES:
        raise StoreUnusable(f"{path}: not a key; remove the store and fill a new one")
    return key
