"""The state of a pad store: the cursor never goes back, whatever happens to processes and files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.bundle.durable import state_folder
from cloven.errors import ForeignBundle, StoreUnusable
from cloven.masks import store_state
from cloven.masks.store_state import LOCK, STATE, STORE, State, StoreState, locked, machine_name
from tests.pad_stores import BUNDLE, OTHER, SHAPES, Ending, Stop, put_back, stop, witness_of

VALID = State(7, (5, 6, 7), (0, 6, 3), ("tcp://a:1", ""))
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are killed here, not machines."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def created(folder: Path) -> StoreState:
    folder.mkdir(mode=0o700)
    with locked(folder):
        StoreState.create(folder, BUNDLE, SHAPES)
    state = StoreState(folder)
    state.commit(lambda now: replace(now, filled=(1000,) * 3))
    return state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty store with 1000 pads of every group, as far as its state says."""
    return created(tmp_path / "pads").folder


def burn(state: StoreState, rows: int = 10) -> int:
    """Reserve; where the cursor is afterwards."""
    return state.commit(lambda now: replace(now, cursor=tuple(value + rows for value in now.cursor))).cursor[0]


def refused(folder: Path, match: str) -> None:
    with pytest.raises(StoreUnusable, match=match) as caught:
        StoreState(folder)
    assert caught.value.exit_code == 1 and str(folder) in str(caught.value) and "\n" not in str(caught.value)


# --- parsing


def test_a_state_comes_back() -> None:
    assert State.from_bytes(VALID.to_bytes(), 3) == VALID
    assert (
        VALID.to_bytes()
        == b'{"generation": 7, "filled": [5, 6, 7], "cursor": [0, 6, 3], "checks": ["tcp://a:1", ""]}'  # the format's vector
    )


def changed(**fields: object) -> bytes:
    return json.dumps(json.loads(VALID.to_bytes()) | fields).encode()


BAD = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"7",
    b"\xff\xfe",
    b"{}",
    changed(more=1),
    changed(generation=-1),
    changed(generation=2**48),
    changed(generation=True),
    changed(generation=1.0),
    changed(generation=None),
    changed(filled=[5, 6]),
    changed(filled=[5, 6, 7, 8]),
    changed(filled=5),
    changed(filled={"1": 1, "2": 2, "3": 3}),
    changed(filled=["5", "6", "7"]),
    changed(cursor=[0, 7, 3]),  # more was used than there is
    changed(cursor=[-1, 6, 3]),
    changed(cursor=[[0], 6, 3]),
    changed(checks="ab"),
    changed(checks={"a": 1}),
    changed(checks=[1]),
    changed(checks=None),
    b'{"generation": 1e999, "filled": [5, 6, 7], "cursor": [0, 6, 3], "checks": []}',
    b'{"generation": NaN, "filled": [5, 6, 7], "cursor": [0, 6, 3], "checks": []}',
    VALID.to_bytes()[:-1],
    VALID.to_bytes() * 2,
    b"9" * 5000,
]


@pytest.mark.parametrize("data", BAD)
def test_malformed_states(data: bytes) -> None:
    with pytest.raises(ValueError):
        State.from_bytes(data, 3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
NUMBERS = st.lists(st.integers(-2, 2**50) | JSON, max_size=4)
RECORDS = st.fixed_dictionaries(
    {"generation": st.integers(-2, 2**50) | JSON, "filled": NUMBERS | JSON, "cursor": NUMBERS | JSON, "checks": st.lists(st.text()) | JSON}
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(VALID.to_bytes())
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data) - 1))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@settings(max_examples=300)
@given(
    st.binary(max_size=60) | JSON.map(lambda one: json.dumps(one).encode()) | RECORDS.map(lambda one: json.dumps(one).encode()) | mutated()
)
def test_garbage_is_a_value_error_or_a_sound_state(data: bytes) -> None:
    try:
        state = State.from_bytes(data, 3)
    except ValueError:
        return
    assert len(state.filled) == len(state.cursor) == 3 and all(type(name) is str for name in state.checks)
    assert all(0 <= cursor <= filled < 2**48 for cursor, filled in zip(state.cursor, state.filled, strict=True))
    assert State.from_bytes(state.to_bytes(), 3) == state


@pytest.mark.parametrize("data", [*BAD, b"[" * 100_000, bytes(17 * 2**20)])
@pytest.mark.parametrize("which", ["state", "witness"])
def test_malformed_files(which: str, data: bytes, folder: Path) -> None:
    (folder / STATE if which == "state" else witness_of(folder)).write_bytes(data)
    refused(folder, "cannot be read or is malformed; remove the store .* and fill a new one")


def identity(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / STORE).read_bytes())
    return record


def with_identity(folder: Path, **fields: object) -> None:
    (folder / STORE).write_text(json.dumps(identity(folder) | fields))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"version": 2}, "not a pad store of version 1"),
        ({"version": "1"}, "not a pad store of version 1"),
        ({"format": "cloven-trusted"}, "not a pad store of version 1"),
        ({"groups": []}, "malformed"),
        ({"groups": [[6, 10]]}, "malformed"),  # fewer than the state lists
        ({"groups": [[6]]}, "malformed"),
        ({"groups": 5}, "malformed"),
        ({"groups": [[0, 10]] * 3}, "malformed"),
        ({"groups": [[2**31, 10]] * 3}, "malformed"),
        ({"groups": [[float("inf"), 10]] * 3}, "malformed"),
        ({"groups": [["x", 10]] * 3}, "malformed"),
        ({"store": "../../../etc/passwd"}, "malformed"),
        ({"store": 5}, "malformed"),
        ({"store": "00" * 16}, "was made elsewhere"),
        ({"more": 1}, "malformed"),
        ({"inode": 1}, "was made elsewhere"),
        ({"inode": "1"}, "was made elsewhere"),
        ({"machine": "0" * 64}, "was made elsewhere"),
    ],
)
def test_another_identity(fields: dict[str, object], match: str, folder: Path) -> None:
    with_identity(folder, **fields)
    refused(folder, match)


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b"[[1]]", b"[" * 100_000, b"\xff", bytes(17 * 2**20)])
def test_malformed_identities(data: bytes, folder: Path) -> None:
    (folder / STORE).write_bytes(data)
    refused(folder, "malformed")


@given(st.binary(max_size=40) | JSON.map(lambda one: json.dumps(one).encode()))
def test_garbage_for_an_identity(tmp_path: Path, data: bytes) -> None:
    (tmp_path / STORE).write_bytes(data)
    with pytest.raises(StoreUnusable):
        StoreState(tmp_path)


# --- commits


def test_every_commit_is_a_generation_and_the_witness_is_written_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = [], store_state.write_durably

    def noted(path: Path, data: bytes) -> None:
        written.append((path, json.loads(data)["generation"]))
        real(path, data)

    monkeypatch.setattr(store_state, "write_durably", noted)
    state = StoreState(folder)
    assert state.read().generation == 1
    assert burn(state) == 10 and burn(state) == 20
    assert written == [(witness_of(folder), 2), (folder / STATE, 2), (witness_of(folder), 3), (folder / STATE, 3)]
    assert StoreState(folder).read() == state.read() == State(3, (1000,) * 3, (20,) * 3)


def test_a_change_that_fails_changes_nothing(folder: Path) -> None:
    state = StoreState(folder)
    before = (folder / STATE).read_bytes(), witness_of(folder).read_bytes()
    with pytest.raises(ZeroDivisionError):
        state.commit(lambda now: replace(now, generation=1 // 0))
    assert ((folder / STATE).read_bytes(), witness_of(folder).read_bytes()) == before
    assert burn(state) == 10  # the lock is free again


OPERATIONS = 6  # of one commit: twice fsync, replace, fsync


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(OPERATIONS))
def test_a_crash_between_any_two_writes(at: int, after: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times in a row, as it may be with a process that is started again and again. The cursor never goes back."""
    state = StoreState(folder)
    cursor = burn(state)
    for turn in range(3):
        with monkeypatch.context() as patch:
            ending = Ending(patch.setattr, at, after, stop)
            with pytest.raises(Stop):
                burn(state)
            assert ending.reached
        state = StoreState(folder)
        now = state.read().cursor[0]
        assert now in (cursor, cursor + 10)
        if turn == 0:  # from the witness's new name on, the pads are burnt; later, what was interrupted is completed first
            assert (now == cursor) == ((at, after) <= (1, False))
        cursor = now
    assert burn(state) == cursor + 10
    assert (folder / STATE).read_bytes() == witness_of(folder).read_bytes()


@pytest.mark.parametrize("at", range(OPERATIONS))
def test_a_full_disk_at_any_moment_as_often_as_it_may_be(at: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise NO_SPACE

    state, before = StoreState(folder), 0
    for _ in range(4):
        with monkeypatch.context() as patch:
            Ending(patch.setattr, at, False, full)
            with pytest.raises(StoreUnusable, match=r"state cannot be written \(No space left on device\); no pad was used"):
                burn(state)
        now = StoreState(folder).read().cursor[0]
        assert now >= before
        before = now
    assert burn(state) == before + 10


@pytest.mark.parametrize("which", ["state", "witness"])
def test_one_of_the_two_disks_is_full_for_long(which: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness is elsewhere: its disk may have room while the store's has none. The two must not drift apart."""
    state, real = StoreState(folder), store_state.write_durably

    def one_is_full(path: Path, data: bytes) -> None:
        if (path.parent == folder) == (which == "state"):
            raise NO_SPACE
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store_state, "write_durably", one_is_full)
        for _ in range(5):
            with pytest.raises(StoreUnusable, match="cannot be written"):
                burn(state)
    assert burn(StoreState(folder)) in (10, 20)


def test_threads_do_not_overlap(folder: Path) -> None:
    seen: list[int] = []

    def work() -> None:
        state = StoreState(folder)
        for _ in range(15):
            seen.append(burn(state))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [10 * step for step in range(1, 61)]


PROCESS = """
import sys
from pathlib import Path
from dataclasses import replace
from cloven.masks.store_state import StoreState
state = StoreState(Path(sys.argv[1]))
for _ in range(30):
    print(state.commit(lambda now: replace(now, cursor=tuple(value + 1 for value in now.cursor))).cursor[0])
"""


def test_processes_do_not_overlap(folder: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", PROCESS, str(folder)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    seen = [int(line) for process in started for line in process.communicate(timeout=60)[0].split()]
    assert sorted(seen) == list(range(1, 91))


def test_a_child_that_was_forked_in_a_commit_holds_nobody_up(folder: Path) -> None:
    """It has a copy of the lock's descriptor: the lock must end with the commit, not with the child."""
    state, children = StoreState(folder), []

    def fork(now: State) -> State:
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
        return now

    state.commit(fork)
    try:
        with locked(folder, wait=False):
            pass
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_the_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(folder), pytest.raises(BlockingIOError), locked(folder, wait=False):
        pass
    with locked(folder, wait=False):
        pass

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", none)
        with pytest.raises(StoreUnusable, match="cannot be locked: No locks available"):
            StoreState(folder)
    place = state_folder() / "pads" / f"{StoreState(folder).identity.store}.{LOCK}"  # beside the witness: clones of the folder share it
    assert place.exists()
    place.unlink()
    place.symlink_to(folder / STORE)
    with pytest.raises(StoreUnusable, match="cannot be locked"):
        StoreState(folder)


def test_a_lock_whose_file_was_removed_excludes_nobody_and_is_taken_again(folder: Path) -> None:
    """Otherwise the one who holds the removed file's lock and the one who made a new file would both be in."""
    other = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(other, fcntl.LOCK_EX)
    inside = threading.Event()

    def enter() -> None:
        with locked(folder):
            inside.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not inside.wait(0.1)
    (folder / LOCK).unlink()
    replacement = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(replacement, fcntl.LOCK_EX)
    os.close(other)
    assert not inside.wait(0.2)  # it has the old file's lock now, and waits for the new one's
    os.close(replacement)
    assert inside.wait(5)
    thread.join()


def test_a_folder_that_others_can_write_to(folder: Path) -> None:
    folder.chmod(0o777)
    with pytest.raises(StoreUnusable, match="others can write there"):
        StoreState(folder)


# --- copies and backups


def test_a_copy_in_another_place(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    subprocess.run(["cp", "-a", folder, tmp_path / "archive"], check=True)
    subprocess.run(["cp", "-al", folder, tmp_path / "links"], check=True)  # the same files, another folder
    for name in ("copy", "archive", "links"):
        refused(
            tmp_path / name, "this pad store was made elsewhere: a copy could use pads that the original uses too; fill a store of its own"
        )
    assert burn(StoreState(folder)) == 10


def test_a_copy_in_the_originals_place(folder: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-a", folder, tmp_path / "copy"], check=True)
    folder.rename(tmp_path / "original")  # kept, so that its inode is not given to another folder
    (tmp_path / "copy").rename(folder)
    refused(folder, "was made elsewhere")
    folder.rename(tmp_path / "copy")
    assert burn(StoreState((tmp_path / "original").rename(folder))) == 10


def test_the_store_itself_may_be_moved(folder: Path, tmp_path: Path) -> None:
    """There is still only one of it."""
    assert burn(StoreState(folder.rename(tmp_path / "elsewhere"))) == 10


def on_machine(patch: pytest.MonkeyPatch, files: dict[str, str | None], node: int = 1) -> None:
    real = Path.read_text

    def read_text(self: Path, *arguments: Any, **more: Any) -> str:
        if str(self) in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
            text = files.get(str(self))
            if text is None:
                raise FileNotFoundError(self)
            return text
        return real(self, *arguments, **more)

    patch.setattr(store_state.Path, "read_text", read_text)
    patch.setattr(store_state.uuid, "getnode", lambda: node)


def test_another_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        on_machine(patch, {"/etc/machine-id": "0123456789abcdef0123456789abcdef\n"})
        refused(folder, "was made elsewhere")
    assert burn(StoreState(folder)) == 10


def test_where_a_machines_name_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for files, node in (
        ({"/etc/machine-id": "a\n", "/var/lib/dbus/machine-id": "b"}, 1),
        ({"/etc/machine-id": "\n", "/var/lib/dbus/machine-id": "b"}, 1),  # empty, as in some containers
        ({"/var/lib/dbus/machine-id": "b"}, 2),
        ({}, 1),
        ({}, 2),
    ):
        with monkeypatch.context() as patch:
            on_machine(patch, dict(files), node)
            names.append(machine_name("s"))
            assert machine_name("t") != names[-1]  # two stores do not tell that they are on one machine
    assert names[1] == names[2] and len(set(names)) == 4 and all(re.fullmatch("[0-9a-f]{64}", name) for name in names)
    with contextlib.suppress(OSError):
        assert Path("/etc/machine-id").read_text().strip() not in machine_name("s")


@pytest.mark.parametrize("commits", [1, 2, 3, 10])
def test_a_restored_folder(commits: int, folder: Path, tmp_path: Path) -> None:
    """One commit behind is what a crash leaves as well: then the witness's later cursor counts. More is refused."""
    shutil.copytree(folder, tmp_path / "backup")
    state = StoreState(folder)
    for _ in range(commits):
        used = burn(state)
    put_back(tmp_path / "backup", folder)
    if commits > 1:
        refused(
            folder, rf"the store is at generation 1, its witness at {1 + commits}: one of them was restored from a backup.*fill a new one"
        )
        with pytest.raises(StoreUnusable):  # nor does a process go on that has had it open all the time
            state.read()
    else:
        assert StoreState(folder).read().cursor[0] == used and burn(state) == used + 10


@pytest.mark.parametrize("commits", [1, 2, 10])
def test_a_restored_witness(commits: int, folder: Path) -> None:
    witness = witness_of(folder)
    backup, state = witness.read_bytes(), StoreState(folder)
    for _ in range(commits):
        burn(state)
    witness.write_bytes(backup)
    refused(folder, f"the store is at generation {1 + commits}, its witness at 1: one of them was restored")


def test_the_same_generation_with_other_contents(folder: Path) -> None:
    """A store and a witness that have gone different ways since a backup."""
    record = json.loads((folder / STATE).read_bytes())
    (folder / STATE).write_text(json.dumps(record | {"filled": [999] * 3}))
    refused(folder, "the store and its witness differ")


@pytest.mark.parametrize("which", ["state", "witness", "the folder of witnesses"])
def test_missing_files(which: str, folder: Path) -> None:
    place = {"state": folder / STATE, "witness": witness_of(folder), "the folder of witnesses": witness_of(folder).parent}[which]
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    refused(folder, "missing, so nobody knows which pads of .* were used; fill a new store")


def test_another_state_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_STATE", str(tmp_path / "other"))
    refused(folder, "missing, so nobody knows")


def test_no_store_there(tmp_path: Path) -> None:
    refused(tmp_path, "no pad store there; make one with `cloven pads fill`")
    refused(tmp_path / "nowhere", "no pad store there")


@pytest.mark.parametrize("name", [STORE, STATE, "witness"])
def test_links_in_the_place_of_files(name: str, folder: Path, tmp_path: Path) -> None:
    path = witness_of(folder) if name == "witness" else folder / name
    path.rename(tmp_path / "real")
    path.symlink_to(tmp_path / "real")
    refused(folder, "cannot be read or is malformed")


def test_another_bundle(folder: Path) -> None:
    state = StoreState(folder)
    state.require_bundle(BUNDLE)
    with pytest.raises(ForeignBundle, match=f"made for bundle {BUNDLE}, not for bundle {OTHER}"):
        state.require_bundle(OTHER)


def test_the_state_disappears_while_the_store_is_open(folder: Path) -> None:
    state = StoreState(folder)
    shutil.rmtree(folder)
    for act in (state.read, lambda: burn(state)):
        with pytest.raises(StoreUnusable, match="missing, so nobody knows"):
            act()


STEPS = st.lists(st.sampled_from(["commit", "commit", "crash 1", "crash 2", "crash 4", "crash 5", "save", "restore"]), max_size=14)


@settings(max_examples=60)
@given(STEPS, st.sampled_from(["folder", "witness"]))
def test_any_sequence_of_crashes_and_of_backups_of_one_of_the_two(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], which: str
) -> None:
    """Slow and obvious: the store is refused, or knows of every index that was ever handed out."""
    folder = tmp_path_factory.getbasetemp() / f"state-{next(_numbers)}"
    created(folder)
    place, saved = (folder / STATE if which == "folder" else witness_of(folder)), None
    handed_out: set[int] = set()
    for step in steps:
        if step == "save":
            saved = place.read_bytes()
        elif step == "restore" and saved is not None:
            place.write_bytes(saved)
        try:
            state = StoreState(folder)
        except StoreUnusable:
            assert "restore" in steps  # never without one
            return
        first = state.read().cursor[0]
        assert all(index < first for index in handed_out)
        if step == "commit":
            handed_out |= set(range(first, burn(state)))
        elif step.startswith("crash"):
            with pytest.MonkeyPatch.context() as crash:
                Ending(crash.setattr, int(step[-1]), False, stop)
                with pytest.raises(Stop):
                    burn(state)  # what was about to be handed out was not


def test_nothing_of_the_machine_is_told(folder: Path) -> None:
    assert set(identity(folder)) == {"store", "bundle", "groups", "machine", "inode", "format", "version"}
    name: Callable[[], str] = lambda: Path("/etc/machine-id").read_text().strip()  # noqa: E731
    with contextlib.suppress(OSError):
        assert name() not in (folder / STORE).read_text()
