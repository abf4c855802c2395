"""The durable state of a pad store, and what binds the store to its place.

    store.json    {format, version, store, bundle, groups, machine, inode}              written once
    state.json    {generation, filled, cursor, checks}                                  replaced at every commit
    $CLOVEN_STATE/pads/STORE.json      the same as state.json: the witness, outside the store's folder

A commit writes the witness first, then state.json, each durably, under the store's lock. So the witness is never older than the store, and
at most one generation ahead; it then holds the later truth, and the next commit brings state.json up to it before it goes on. Anything else
is a copy, or was restored from a backup: its cursor has forgotten pads that were used, and it is refused. The machine and the folder's
inode tell a copy of both.

What cannot be detected: a machine, virtual or not, whose whole disk is rolled back; and a restore of both, the store's files in their place
and its witness: neither may be in a backup.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cloven.bundle.durable import read_small, state_folder, write_durably
from cloven.errors import ForeignBundle, StoreUnusable

STORE, STATE, LOCK = "store.json", "state.json", "lock"
FORMAT, VERSION = "cloven-pads", 1
_MAX_BYTES = 16 * 2**20
_HEX = re.compile(r"[0-9a-f]{32}")
_LARGEST = 2**48


@dataclass(frozen=True)
class State:
    """What changes in a store.

    Args:
        generation: number of commits.
        filled: pads made so far, by group; the first index that does not exist yet.
        cursor: pads burnt so far, by group: an index below it is never handed out again.
        checks: the workers' identities by number of their secret S; "" marks one that was dropped after a reject.
    """

    generation: int
    filled: tuple[int, ...]
    cursor: tuple[int, ...]
    checks: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes, groups: int) -> State:
        """Parse and check.

        Raises:
            ValueError: malformed.
        """
        record = json.loads(data)
        if not isinstance(record, dict) or set(record) != {"generation", "filled", "cursor", "checks"}:
            raise ValueError
        if any(type(record[name]) is not list for name in ("filled", "cursor", "checks")):
            raise ValueError
        numbers = [record["generation"], *record["filled"], *record["cursor"]]
        if any(type(number) is not int or not 0 <= number < _LARGEST for number in numbers):
            raise ValueError
        if len(record["filled"]) != groups or len(record["cursor"]) != groups or any(type(name) is not str for name in record["checks"]):
            raise ValueError
        if any(cursor > filled for cursor, filled in zip(record["cursor"], record["filled"], strict=True)):
            raise ValueError
        return cls(record["generation"], tuple(record["filled"]), tuple(record["cursor"]), tuple(record["checks"]))


@dataclass(frozen=True)
class Identity:
    """What never changes in a store: its number, its bundle, the groups' shapes [N, K], and where it was made."""

    store: str
    bundle: str
    groups: tuple[tuple[int, int], ...]
    machine: str
    inode: int
    format: str = field(default=FORMAT)
    version: int = field(default=VERSION)


class StoreState:
    """Access to a store's state; every change is a commit.

    Args:
        folder: of the store.

    Raises:
        StoreUnusable: no store, a malformed one, a copy, or one that was restored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = _read_identity(folder)
        if self.identity.inode != folder.stat().st_ino or self.identity.machine != machine_name(self.identity.store):
            raise StoreUnusable(
                f"{folder}: this pad store was made elsewhere: a copy could use pads that the original uses too; "
                "fill a store of its own here with `cloven pads fill`"
            )
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise StoreUnusable(f"{folder}: belongs to another user, or others can write there; remove the store and fill a new one")
        with self._locked():
            self._load()

    @classmethod
    def create(cls, folder: Path, bundle: str, groups: tuple[tuple[int, int], ...]) -> None:
        """Make the state of an empty store in a folder that is there already, and `locked`; the store is there when store.json is."""
        number = secrets.token_hex(16)
        identity = Identity(number, bundle, groups, machine_name(number), folder.stat().st_ino)
        state = State(0, (0,) * len(groups), (0,) * len(groups)).to_bytes()
        witness = _witness(number)
        witness.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(witness, state)
        write_durably(folder / STATE, state)
        write_durably(folder / STORE, json.dumps(asdict(identity)).encode())

    def require_bundle(self, bundle: str) -> None:
        """Refuse the store of another bundle.

        Raises:
            ForeignBundle: it is.
        """
        if self.identity.bundle != bundle:
            raise ForeignBundle(f"{self.folder}: these pads were made for bundle {self.identity.bundle}, not for bundle {bundle}")

    def read(self) -> State:
        """The state as it is now.

        Raises:
            StoreUnusable: see the class.
        """
        with self._locked():
            return self._load()[0]

    def commit(self, change: Callable[[State], State]) -> State:
        """Apply a change, durably, before anything is done that relies on it; the new state.

        Raises:
            StoreUnusable: the state cannot be read or written.
        """
        with self._locked():
            state, behind = self._load()
            new = replace(change(state), generation=state.generation + 1)
            data = new.to_bytes()
            try:
                if behind:  # or a second commit that is interrupted would leave the two two generations apart
                    write_durably(self.folder / STATE, state.to_bytes())
                write_durably(_witness(self.identity.store), data)
                write_durably(self.folder / STATE, data)
            except OSError as error:
                raise StoreUnusable(f"{self.folder}: the store's state cannot be written ({error.strerror}); no pad was used") from error
            return new

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock is beside the witness: a clone of the store's file system that is mounted elsewhere has the same one."""
        witness = _witness(self.identity.store)
        try:
            witness.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnusable(f"{witness.parent}: cannot be made: {error.strerror}; no pad was used") from error
        with locked(witness.parent, f"{self.identity.store}.{LOCK}"):
            yield

    def _load(self) -> tuple[State, bool]:
        """The state, and whether state.json is a generation behind it: a commit was interrupted."""
        state, witness = self._parsed(self.folder / STATE), self._parsed(_witness(self.identity.store))
        if witness.generation - state.generation not in (0, 1):
            raise StoreUnusable(
                f"{self.folder}: the store is at generation {state.generation}, its witness at {witness.generation}: one of them was "
                "restored from a backup, and has forgotten pads that were used; remove the store and fill a new one"
            )
        if witness.generation == state.generation and witness != state:
            raise StoreUnusable(f"{self.folder}: the store and its witness differ; remove the store and fill a new one")
        return witness, witness.generation > state.generation

    def _parsed(self, path: Path) -> State:
        try:
            return State.from_bytes(read_small(path, _MAX_BYTES), len(self.identity.groups))
        except FileNotFoundError as error:
            raise StoreUnusable(f"{path}: missing, so nobody knows which pads of {self.folder} were used; fill a new store") from error
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreUnusable(f"{path}: cannot be read or is malformed; remove the store {self.folder} and fill a new one") from error


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK, wait: bool = True) -> Iterator[None]:
    """Hold a store's lock against every other process and thread.

    Raises:
        StoreUnusable: there can be no lock.  BlockingIOError: somebody has it, and `wait` is false.
    """
    descriptor = _lock(folder / name, wait)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile holds the descriptor as well
        os.close(descriptor)


def _lock(path: Path, wait: bool) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreUnusable(f"{path.parent}: the store cannot be locked: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == path.stat().st_ino:
                    return descriptor
            os.close(descriptor)  # somebody removed the file meanwhile: a lock on it excludes nobody
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            os.close(descriptor)
            raise StoreUnusable(f"{path.parent}: the store cannot be locked: {error.strerror}") from error


def machine_name(store: str) -> str:
    """This machine, as a store knows it: a hash, so that the store does not tell which one it was made on."""
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        try:
            name = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if name:
            break
    else:
        name = f"{uuid.getnode():x}"
    return hashlib.sha256(f"cloven/pads/machine/{store}/{name}".encode()).hexdigest()


def _witness(store: str) -> Path:
    return state_folder() / "pads" / f"{store}.json"


def _read_identity(folder: Path) -> Identity:
    path = folder / STORE
    try:
        record: Any = json.loads(read_small(path, _MAX_BYTES))
        identity = Identity(**{**record, "groups": tuple((int(rows), int(columns)) for rows, columns in record["groups"])})
    except FileNotFoundError as error:
        raise StoreUnusable(f"{folder}: no pad store there; make one with `cloven pads fill`") from error
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise StoreUnusable(f"{path}: cannot be read or is malformed; remove the store and fill a new one") from error
    if (identity.format, identity.version) != (FORMAT, VERSION):
        raise StoreUnusable(f"{path}: not a pad store of version {VERSION}; remove it and fill a new one")
    sizes = [size for group in identity.groups for size in group]
    if not sizes or not all(0 < size < 2**31 for size in sizes) or not _HEX.fullmatch(str(identity.store)):
        raise StoreUnusable(f"{path}: malformed; remove the store and fill a new one")
    return identity
