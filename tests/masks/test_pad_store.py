"""The store: no pad twice, whoever asks, whatever is copied, restored, altered or interrupted."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.errors import BadInput, ClovenError, ForeignBundle, PadMisuse, RunError, StoreEmpty, StoreUnusable, VerificationFailed
from cloven.field.freivalds import Freivalds
from cloven.masks import pad_store, store_files
from cloven.masks.pad_store import AHEAD, BLOCK, KEY, WORKERS, GroupStatus, PadStore, check_bytes
from cloven.masks.store_files import TAG_BYTES
from cloven.masks.store_state import STATE, STORE
from tests.helpers import random_residues
from tests.pad_stores import (
    BUNDLE,
    CODES,
    OTHER,
    SHAPES,
    Ending,
    Stop,
    add,
    filled,
    images_of,
    indices,
    masks_of,
    opened,
    put_back,
    stop,
    take,
    witness_of,
)

RESERVED = BLOCK - AHEAD
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are killed here, not machines."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with 200 pads of every group."""
    filled(tmp_path / "pads").close()
    return tmp_path / "pads"


def cursor(store: PadStore) -> tuple[int, ...]:
    return store._state.read().cursor


# --- taking


def test_pads_are_handed_out_in_order_and_are_right(folder: Path) -> None:
    store = opened(folder)
    assert [take(store, 0, rows) for rows in (1, 2, 60, 5)] == [[0], [1, 2], list(range(3, 63)), list(range(63, 68))]
    assert take(store, 2, 3) == [0, 1, 2] and take(store, 1, 200) == list(range(200))
    assert store.filled(0) == 200 and [store.left(group) for group in range(3)] == [132, 0, 197]


def test_the_masks_are_uniform_residues_that_only_the_key_gives(folder: Path, tmp_path: Path) -> None:
    first, _ = masks_of(folder, 0, 200), opened(folder)
    assert torch.equal(first, opened(folder).masks(0, 0, 200))
    assert len({tuple(row) for row in first.tolist()}) == 200
    other = filled(tmp_path / "other")
    assert not (first == other.masks(0, 0, 200)).any(1).all() and (folder / KEY).read_bytes() != (tmp_path / "other" / KEY).read_bytes()
    assert not torch.equal(first[:, :7], masks_of(folder, 2, 200))  # every group has its own


def test_pads_are_burnt_before_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = opened(folder), []
    real = store_files.GroupFiles.take

    def noted(self: store_files.GroupFiles, first: int, rows: int) -> torch.Tensor:
        seen.append((first + rows, cursor(opened(folder))[0]))  # as another process sees it
        return real(self, first, rows)

    monkeypatch.setattr(store_files.GroupFiles, "take", noted)
    for rows in (1, 50, 30, 1):
        take(store, 0, rows)
    assert seen and all(end <= burnt for end, burnt in seen)


def test_the_store_runs_dry(folder: Path) -> None:
    store = opened(folder)
    take(store, 0, 195)
    with pytest.raises(StoreEmpty, match=r"5 pads are left of group 0, 6 are needed: run `cloven pads fill`") as caught:
        store.take(0, 6)
    assert caught.value.exit_code == 1 and str(folder) in str(caught.value)
    assert take(store, 0, 5) == list(range(195, 200))  # the refusal used none
    with pytest.raises(StoreEmpty, match="0 pads are left"):
        store.take(0, 1)
    add(store, 10)
    assert take(store, 0, 10) == list(range(200, 210))


def test_dry_with_a_rest_of_a_block(folder: Path) -> None:
    store = opened(folder)
    take(store, 0, 200 - RESERVED)
    take(store, 0, 1)  # the last block is reserved now
    assert cursor(store)[0] == 200 and store.left(0) == RESERVED - 1
    for _ in range(2):
        with pytest.raises(StoreEmpty):
            store.take(0, RESERVED)
    assert take(store, 0, RESERVED - 1) == list(range(201 - RESERVED, 200))


def test_at_most_a_block_is_reserved(folder: Path) -> None:
    store = opened(folder)
    for _ in range(120):
        for group in range(3):
            take(store, group, 1)
            status = store.status()
            assert all(one.burnt <= RESERVED for one in status) and BLOCK == RESERVED + AHEAD
    commits = store._state.read().generation
    assert commits < 1 + 3 + 4 * 3  # filled thrice; then one commit serves all groups


def test_a_rest_that_has_somebody_elses_block_behind_it_is_not_prolonged(folder: Path) -> None:
    first, second = opened(folder), opened(folder)
    take(first, 0, RESERVED - 2)
    take(second, 0, 1)
    take(first, 1, 1)  # refills what is short on the way, where nobody stands behind it
    got = take(first, 0, 5)
    assert got[:2] == [RESERVED - 2, RESERVED - 1] and got[2:] == [2 * RESERVED, 2 * RESERVED + 1, 2 * RESERVED + 2]
    assert take(second, 0, 3) == [RESERVED + 1, RESERVED + 2, RESERVED + 3]


def test_the_status(folder: Path) -> None:
    store = opened(folder)
    assert store.status() == [GroupStatus(200, 0, 0, 0, 200)] * 3
    take(store, 1, 2)
    assert store.status()[1] == GroupStatus(200, 2, RESERVED - 2, 0, 200 - RESERVED)
    store.give_back()
    assert store.status() == [GroupStatus(200, 0, 0, 0, 200), GroupStatus(200, 2, 0, 0, 198), GroupStatus(200, 0, 0, 0, 200)]


def test_what_a_clean_end_gives_back_is_used_by_the_next_one(folder: Path) -> None:
    first = opened(folder)
    assert take(first, 0, 3) == [0, 1, 2]
    first.give_back()
    first.give_back()
    first.close()
    assert take(opened(folder), 0, 2) == [3, 4]


def test_what_was_given_back_is_not_used_by_whoever_gave_it(folder: Path) -> None:
    first, second = opened(folder), opened(folder)
    take(first, 0, 3)
    first.give_back()
    assert take(second, 0, 5) == [3, 4, 5, 6, 7]
    assert take(first, 0, 5) == list(range(3 + RESERVED, 8 + RESERVED))


def test_nothing_is_given_back_past_somebody_elses_block(folder: Path) -> None:
    first, second = opened(folder), opened(folder)
    take(first, 0, 3)
    take(second, 0, 3)
    first.give_back()
    assert cursor(first)[0] == 2 * RESERVED  # the second's block stands behind it: these pads are lost
    second.give_back()
    assert cursor(first)[0] == RESERVED + 3


# --- against a slow and obvious model: sets of indices

STEP = st.one_of(
    st.tuples(st.just("take"), st.integers(0, 2), st.integers(0, 2), st.integers(1, 9)),
    st.tuples(st.just("take"), st.integers(0, 2), st.integers(0, 2), st.integers(1, 9)),
    st.tuples(st.sampled_from(["give back", "end", "kill"]), st.integers(0, 2), st.just(0), st.just(0)),
    st.tuples(st.just("fill"), st.just(0), st.just(0), st.integers(1, 20)),
)


@settings(max_examples=30)
@given(st.lists(STEP, max_size=30))
def test_any_interleaving_of_three_processes(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int]]) -> None:
    folder = tmp_path_factory.getbasetemp() / f"store-{next(_numbers)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pad_store, "_RESERVED", 8)
        stores = [filled(folder, 30), opened(folder), opened(folder)]
        made = 30
        gone: list[set[int]] = [set(), set(), set()]  # by group: handed out
        lost: list[set[int]] = [set(), set(), set()]  # reserved by somebody who was killed, or who could not give back
        for kind, who, group, rows in steps:
            own = [set(range(*stores[who]._reserved[one])) for one in range(3)]
            free = set(range(cursor(stores[who])[group], made))
            if kind == "take":
                if len(own[group]) + len(free) < rows:
                    with pytest.raises(StoreEmpty):
                        stores[who].take(group, rows)
                    assert [set(range(*stores[who]._reserved[one])) for one in range(3)] == own
                    continue
                got = take(stores[who], group, rows)
                assert len(set(got)) == rows and not gone[group] & set(got) and not lost[group] & set(got)
                assert set(got) <= own[group] | free and got == sorted(got)
                gone[group] |= set(got)
            elif kind == "fill":
                add(stores[0], rows)
                made += rows
            else:
                if kind == "kill":
                    lost = [before | mine for before, mine in zip(lost, own, strict=True)]
                else:
                    stores[who].give_back()
                    now = cursor(stores[who])
                    lost = [before | {one for one in mine if one < end} for before, mine, end in zip(lost, own, now, strict=True)]
                if kind != "give back":
                    stores[who] = opened(folder)
            for one in range(3):
                ranges = [set(range(*store._reserved[one])) for store in stores]
                assert sum(map(len, ranges)) == len(set().union(*ranges)) and all(len(mine) <= 8 for mine in ranges)
                burnt = set(range(cursor(stores[0])[one]))
                assert burnt == gone[one] | lost[one] | set().union(*ranges)  # nothing is forgotten, nothing else is gone
        for one, status in enumerate(stores[0].status()):
            assert status == GroupStatus(
                made, len(gone[one]), len(burnt_of(stores[0], one)) - len(gone[one]), 0, made - cursor(stores[0])[one]
            )


def burnt_of(store: PadStore, group: int) -> set[int]:
    return set(range(cursor(store)[group]))


def test_threads_of_one_store_and_of_two(folder: Path) -> None:
    stores = [opened(folder), opened(folder)]
    got: list[tuple[int, int]] = []
    errors: list[BaseException] = []

    def work(store: PadStore, seed: int) -> None:
        try:
            for step in range(20):
                group, rows = (step + seed) % 3, 1 + (step * seed) % 4
                got.extend((group, index) for index in take(store, group, rows))
                if step % 7 == seed % 7:
                    store.give_back()
        except StoreEmpty:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(stores[number % 2], number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and max(Counter(got).values()) == 1 and len(got) > 20
    assert sum(one.used for one in stores[0].status()) == len(got) and all(one.reused == 0 for one in stores[0].status())


PROCESS = """
import os
import sys
os.fsync = lambda _: None
from pathlib import Path
from tests.pad_stores import opened, take
from cloven.errors import StoreEmpty
store = opened(Path(sys.argv[1]))
try:
    for step in range(200):
        for group in range(3):
            print(group, *take(store, group, 1 + step % 3), flush=True)
        if step % 20 == 19:
            store.give_back()
except StoreEmpty:
    print("empty")
store.give_back()
"""


def process(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_store_until_it_is_empty(folder: Path) -> None:
    got: Counter[tuple[int, int]] = Counter()
    for one in [process(folder) for _ in range(2)]:
        out, errors = one.communicate(timeout=60)
        assert one.returncode == 0, errors
        lines = out.splitlines()
        assert lines[-1] == "empty"
        for line in lines[:-1]:
            group, *taken = map(int, line.split())
            got.update((group, index) for index in taken)
    assert max(got.values()) == 1 and len(got) > 300
    assert [one.reused for one in opened(folder).status()] == [0, 0, 0]


# --- an interrupted reservation


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(6))
def test_a_crash_while_it_reserves(at: int, after: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = Counter(take(opened(folder), 0, 5))
    for _ in range(2):
        with monkeypatch.context() as patch:
            ending = Ending(patch.setattr, at, after, stop)
            with pytest.raises(Stop):
                opened(folder).take(0, 3)
            assert ending.reached
        got.update(take(opened(folder), 0, 2))
    assert max(got.values()) == 1 and max(got) < 5 * RESERVED
    assert [one.reused for one in opened(folder).status()] == [0, 0, 0]


def test_a_full_disk_while_it_reserves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, got = opened(folder), Counter[int]()
    got.update(take(store, 0, RESERVED))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            for _ in range(3):
                with pytest.raises(StoreUnusable, match="no pad was used"):
                    store.take(0, 1)
    got.update(take(store, 0, 3))
    assert max(got.values()) == 1


# --- filling


def test_what_is_filled_by_halves_is_as_if_it_was_never_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(folder)
    masks = store.masks(0, 200, 10)
    for at, after in itertools.product(range(10), (False, True)):
        with monkeypatch.context() as patch:
            Ending(patch.setattr, at, after, stop)
            with pytest.raises(Stop):
                store.append(0, 200, images_of(0, masks))
        assert opened(folder).filled(0) in (200, 210)
        if opened(folder).filled(0) == 210:
            break
    else:
        store.append(0, 200, images_of(0, masks))
    assert take(opened(folder), 0, 210) == list(range(210))


def test_a_full_disk_at_any_moment_of_a_fill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(folder)
    images = images_of(0, store.masks(0, 200, 1000))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for at in itertools.count():
        with monkeypatch.context() as patch:
            ending = Ending(patch.setattr, at, False, full)
            with contextlib.suppress(RunError, StoreUnusable):
                store.append(0, 200, images)
        if not ending.reached:
            break
        if opened(folder).filled(0) == 1200:  # the witness was written
            break
    assert at >= 6 and opened(folder).filled(0) == 1200
    assert take(opened(folder), 0, 1200) == list(range(1200))


def test_two_fills_at_once(folder: Path) -> None:
    first, second = opened(folder), opened(folder)
    with first.filling(), pytest.raises(RunError, match="another `cloven pads fill` is at work"), second.filling():
        pass
    with second.filling():
        pass
    images = images_of(0, first.masks(0, 200, 5))
    first.append(0, 200, images)
    with pytest.raises(RunError, match="another `cloven pads fill` is at work"):
        second.append(0, 200, images)
    assert take(first, 0, 205) == list(range(205))


def test_pads_are_added_while_others_use_them(folder: Path) -> None:
    user, filler = opened(folder), opened(folder)
    got = []
    for _ in range(10):
        got += take(user, 0, 30)
        add(filler, 30)
    assert got == list(range(300))


def test_old_files_are_removed(folder: Path) -> None:
    store = opened(folder)
    add(store, 6000)
    store.take(0, 6100)
    store.drop_used_files()
    assert len(list(folder.glob("group-00000-*.pads"))) == 6 and len(list(folder.glob("group-00001-*.pads"))) == 7  # 4096 pads are kept
    assert store.take(0, 50)[0] == 6100 and store.status()[0].used == 6150


def test_a_store_is_only_made_in_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(BadInput, match="holds other files; choose another --store"):
        filled(tmp_path)
    with pytest.raises(BadInput, match="cannot be made there: Not a directory"):
        filled(tmp_path / "mine.txt" / "pads")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "lock") == ["mine.txt"]


def test_a_store_without_its_identity_is_not_begun_again(folder: Path) -> None:
    """Its cursor would begin at 0 again."""
    (folder / STORE).unlink()
    with pytest.raises(BadInput, match="holds other files"):
        filled(folder)
    with pytest.raises(StoreUnusable, match="no pad store there"):
        opened(folder)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(15))
def test_a_creation_that_was_interrupted_is_done_again(at: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        ending = Ending(patch.setattr, at, after, stop)
        with pytest.raises(Stop):
            PadStore(tmp_path / "pads", BUNDLE, SHAPES)
        assert ending.reached
    assert take(filled(tmp_path / "pads", 3), 0, 3) == [0, 1, 2]


def test_two_who_make_the_same_store(tmp_path: Path) -> None:
    stores: list[PadStore] = []
    threads = [threading.Thread(target=lambda: stores.append(PadStore(tmp_path / "pads", BUNDLE, SHAPES))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    add(stores[0], 6 * RESERVED)
    assert sorted(index for store in stores for index in take(store, 0, RESERVED)) == list(range(6 * RESERVED))


def test_backups_leave_it_out_and_nobody_else_reads_it(folder: Path) -> None:
    assert (folder / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in [*folder.iterdir(), witness_of(folder)]} == {0o600}


# --- what is refused

Damage = Callable[[Path], None]
USED_BY_TEST = 10  # pads of group 0 that were taken before


def flipped(name: str, offset: int) -> Damage:
    def damage(folder: Path) -> None:
        path = witness_of(folder) if name == "witness" else folder / name
        data = bytearray(path.read_bytes())
        data[offset] ^= 4
        path.write_bytes(data)

    return damage


def cut(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(witness_of(folder) if name == "witness" else folder / name, size)


def removed(name: str) -> Damage:
    return lambda folder: (witness_of(folder) if name == "witness" else folder / name).unlink()


def linked(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = witness_of(folder) if name == "witness" else folder / name
        path.rename(folder.parent / "elsewhere")
        path.symlink_to(folder.parent / "elsewhere")

    return damage


def swapped(first: str, second: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / first).rename(folder / "between")
        (folder / second).rename(folder / first)
        (folder / "between").rename(folder / second)

    return damage


def swapped_records(folder: Path) -> None:
    size = 4 * SHAPES[0][0] + TAG_BYTES
    path = folder / "group-00000-000000.pads"
    data = path.read_bytes()
    places = [data[size * index : size * (index + 1)] for index in range(len(data) // size)]
    path.write_bytes(b"".join(reversed(places)))


def readable_key(folder: Path) -> None:
    (folder / KEY).chmod(0o640)


def key_of_another_store(folder: Path) -> None:
    filled(folder.parent / "other", 1).close()
    shutil.copy(folder.parent / "other" / KEY, folder / KEY)


PADS, CHECKS_FILE, USED = "group-00000-000000.pads", "group-00000.checks", "group-00000.used"
DAMAGES: dict[str, tuple[Damage, type[ClovenError], str]] = {
    "store.json altered": (flipped(STORE, 3), StoreUnusable, "malformed|not a pad store"),
    "state.json altered": (flipped(STATE, 2), StoreUnusable, "malformed"),
    "witness altered": (flipped("witness", 2), StoreUnusable, "malformed"),
    "key altered": (flipped(KEY, 0), StoreUnusable, "checks cannot be read or were altered"),
    "checks altered": (flipped(CHECKS_FILE, 9), StoreUnusable, "checks cannot be read or were altered"),
    "pads altered": (flipped(PADS, USED_BY_TEST * (4 * 6 + TAG_BYTES)), StoreUnusable, "is not what was written"),
    "marks altered": (flipped(USED, USED_BY_TEST), PadMisuse, "was used before; it was not used again"),
    "store.json cut": (cut(STORE, 30), StoreUnusable, "malformed"),
    "state.json cut": (cut(STATE, 0), StoreUnusable, "malformed"),
    "witness cut": (cut("witness", 40), StoreUnusable, "malformed"),
    "key cut": (cut(KEY, 31), StoreUnusable, "not a key"),
    "checks cut": (cut(CHECKS_FILE, 50), StoreUnusable, "checks cannot be read or were altered"),
    "pads cut": (cut(PADS, USED_BY_TEST * (4 * 6 + TAG_BYTES) + 5), StoreUnusable, "is not what was written"),
    "pads cut to nothing": (cut(PADS, 0), StoreUnusable, "cannot be read"),
    "marks cut": (cut(USED, 3), StoreUnusable, "too short"),
    "store.json missing": (removed(STORE), StoreUnusable, "no pad store there"),
    "state.json missing": (removed(STATE), StoreUnusable, "missing, so nobody knows"),
    "witness missing": (removed("witness"), StoreUnusable, "missing, so nobody knows"),
    "key missing": (removed(KEY), StoreUnusable, "the key cannot be read"),
    "checks missing": (removed(CHECKS_FILE), StoreUnusable, "checks cannot be read"),
    "pads missing": (removed(PADS), StoreUnusable, "cannot be read"),
    "marks missing": (removed(USED), StoreUnusable, "cannot be read"),
    "store.json a link": (linked(STORE), StoreUnusable, "malformed"),
    "state.json a link": (linked(STATE), StoreUnusable, "malformed"),
    "witness a link": (linked("witness"), StoreUnusable, "malformed"),
    "key a link": (linked(KEY), StoreUnusable, "key"),
    "checks a link": (linked(CHECKS_FILE), StoreUnusable, "checks cannot be read"),
    "pads a link": (linked(PADS), StoreUnusable, "cannot be read"),
    "marks a link": (linked(USED), StoreUnusable, "cannot be read"),
    "groups' files swapped": (swapped(PADS, "group-00002-000000.pads"), StoreUnusable, "is not what was written|cannot be read"),
    "groups' checks swapped": (swapped(CHECKS_FILE, "group-00002.checks"), StoreUnusable, "checks cannot be read or were altered"),
    "records swapped": (swapped_records, StoreUnusable, "is not what was written"),
    "key readable by others": (readable_key, StoreUnusable, "others can read the key"),
    "key of another store": (key_of_another_store, StoreUnusable, "checks cannot be read or were altered"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_is_refused(name: str, folder: Path) -> None:
    """As a session opens it: the checks of all groups, then pads."""
    with contextlib.closing(opened(folder)) as store:
        take(store, 0, USED_BY_TEST)
        store.give_back()
    damage, kind, match = DAMAGES[name]
    damage(folder)
    with pytest.raises(kind, match=match) as caught:
        store = opened(folder)
        for group in range(3):
            store.freivalds(0, group)
        store.take(0, 1)
    assert type(caught.value) is kind and "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_the_store_of_another_bundle(folder: Path) -> None:
    with pytest.raises(ForeignBundle, match=f"these pads were made for bundle {BUNDLE}, not for bundle {OTHER}"):
        opened(folder, OTHER)
    with pytest.raises(ForeignBundle):
        PadStore(folder, OTHER, SHAPES)  # a fill


def test_a_backup_of_the_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "backup")
    store = opened(folder)
    for _ in range(3):
        used = take(store, 0, RESERVED)
    put_back(tmp_path / "backup", folder)
    for act in (lambda: opened(folder), lambda: store.take(0, 1)):
        with pytest.raises(StoreUnusable, match="restored from a backup"):
            act()
    assert used


def test_a_backup_that_is_one_commit_old_is_what_a_crash_leaves_too(folder: Path, tmp_path: Path) -> None:
    """The cursor is the witness's: the pads that the backup has forgotten are not used again."""
    shutil.copytree(folder, tmp_path / "backup")
    used = take(opened(folder), 0, RESERVED)
    put_back(tmp_path / "backup", folder)
    assert not set(used) & set(take(opened(folder), 0, RESERVED))


# --- checks


def test_the_checks_that_a_store_carries(folder: Path) -> None:
    store = opened(folder)
    for group, codes in enumerate(CODES):
        c = random_residues(4, codes.shape[1])
        z = images_of(group, c)
        for number in (0, 1, WORKERS - 1):
            check = store.freivalds(number, group)
            check.check(c, z, "an answer")
            with pytest.raises(VerificationFailed):
                check.check(c, z.roll(1, 0), "an answer")
    assert (folder / CHECKS_FILE).stat().st_size == check_bytes(SHAPES[0][1])


def test_every_worker_and_group_has_its_own_secret(folder: Path, tmp_path: Path) -> None:
    stores = opened(folder), filled(tmp_path / "other", 0)
    secrets = [store._secret(number, group, 5) for store in stores for number in range(WORKERS) for group in range(3)]
    assert len({tuple(secret.flatten().tolist()) for secret in secrets}) == len(secrets)
    assert all(len({tuple(secret.flatten().tolist()[:1]) for secret in secrets}) > 90 for _ in range(1))
    assert torch.equal(stores[0]._secret(3, 1, 9), opened(folder)._secret(3, 1, 9))


def test_checks_are_computed_once(folder: Path) -> None:
    def never() -> None:
        raise AssertionError("W was asked for")

    assert opened(folder).has_checks(0)
    opened(folder).write_checks(0, never)  # type: ignore[arg-type]


def test_a_full_disk_while_checks_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PadStore(tmp_path / "pads", BUNDLE, SHAPES)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(RunError, match="the checks of group 0 cannot be written: No space left on device"):
            add(store, 1)
    assert not store.has_checks(0)
    add(store, 5)
    assert take(store, 0, 5) == list(range(5))


def test_a_worker_keeps_its_number_until_it_is_dropped(folder: Path) -> None:
    store = opened(folder)
    assert [store.check_number(name) for name in ("a", "b", "a", "c")] == [1, 2, 1, 3]
    assert opened(folder).check_number("b") == 2
    opened(folder).drop_check("b")
    assert store.check_number("b") == 4  # for every process, from now on
    assert [store.check_number(name) for name in ("a", "c", "b")] == [1, 3, 4]
    store.drop_check("nobody")
    assert store._state.read().checks == ("a", "", "c", "b")


def test_no_name_is_not_the_name_of_what_was_dropped(folder: Path) -> None:
    store = opened(folder)
    store.check_number("a")
    store.drop_check("a")
    with pytest.raises(BadInput, match="without an address"):
        store.check_number("")


def test_all_secrets_are_used_up(folder: Path) -> None:
    store = opened(folder)
    assert [store.check_number(f"w{number}") for number in range(WORKERS - 1)] == list(range(1, WORKERS))
    with pytest.raises(BadInput, match="serves 15 workers, and these are used up; remove the store and fill a new one"):
        store.check_number("one more")
    assert store.check_number("w14") == 15
    store.drop_check("w14")
    with pytest.raises(BadInput, match="used up"):  # what was dropped is not given to another one
        store.check_number("w14")


def test_two_processes_name_the_same_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have read that it has no number yet."""
    store, other = opened(folder), opened(folder)
    real = store._state.commit

    def after_the_other(change: Callable[..., object]) -> object:
        other.check_number("b")
        other.check_number("a")
        return real(change)  # type: ignore[arg-type]

    monkeypatch.setattr(store._state, "commit", after_the_other)
    assert store.check_number("a") == other.check_number("a") == 2


# --- forks, ends, and what is never shown


def in_child(act: Callable[[], object]) -> str:
    """What happens in a forked child: the error's class and message, or "nothing"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            text = "nothing"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


def test_a_forked_child_can_neither_take_nor_see_the_key(folder: Path) -> None:
    store = opened(folder)
    take(store, 0, 3)
    before = cursor(store)
    for act in (
        lambda: store.take(0, 1),
        lambda: store.masks(0, 0, 1),
        lambda: store._files[0].take(4, 1),
        lambda: store.freivalds(1, 0),
        lambda: store.append(0, 200, random_residues(1, 6)),
    ):
        assert in_child(act).startswith("PadMisuse: the pad store is closed, or this process was forked")

    def look() -> None:
        assert not any(store._key) and store._files[0]._cipher is None

    assert in_child(look) == "nothing"
    assert cursor(store) == before and take(store, 0, 2) == [3, 4]


def test_a_forked_child_does_not_give_back_what_its_parent_uses(folder: Path) -> None:
    """It ends its copy of the session cleanly: then the parent's block must not be handed out to anybody else."""
    store = opened(folder)
    assert take(store, 0, 3) == [0, 1, 2]
    assert in_child(lambda: (store.give_back(), store.close())) == "nothing"
    assert not set(take(opened(folder), 0, 5)) & set(take(store, 0, 5))


def test_a_fork_while_another_thread_takes(folder: Path) -> None:
    """The child's copy of the lock is held for ever by a thread that it does not have."""
    store = opened(folder)
    with store._lock:
        assert in_child(store.close) == "nothing"


def test_a_closed_store(folder: Path) -> None:
    store = opened(folder)
    take(store, 0, 3)
    key = store._key
    store.close()
    store.close()
    assert not any(key)
    for act in (lambda: store.take(0, 1), lambda: store.masks(0, 0, 1), lambda: store.freivalds(0, 0), lambda: take(store, 1, 1)):
        with pytest.raises(PadMisuse, match="closed"):
            act()
    assert store.status()[0].used == 3


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def test_nothing_secret_is_shown(folder: Path, logged: pytest.LogCaptureFixture) -> None:
    store = opened(folder)
    assert repr(store) == f"PadStore({folder}, <secret>)" and repr(store._files[0]) == "GroupFiles(0, <secret>)"
    assert repr(store.freivalds(0, 0)) == "Freivalds(<secret>)"
    key, masks, images = (folder / KEY).read_bytes(), *store.take(0, 2)[1:]
    shown = [repr(store), logged.text]
    for name in ("pads altered", "marks altered", "checks altered"):
        with contextlib.suppress(OSError):
            DAMAGES[name][0](folder)
        with pytest.raises(ClovenError) as caught:
            store.freivalds(0, 0)
            store.take(0, 100)
        shown.append(str(caught.value) + repr(caught.value))
    text = " ".join(shown)
    assert key.hex() not in text and str(key) not in text
    assert not any(str(value) in text for value in (*masks.flatten().tolist(), *images.flatten().tolist()) if abs(value) > 10**6)
    files = b"".join(path.read_bytes() for path in folder.iterdir() if path.name != KEY)
    assert key not in files and not any(row.numpy().tobytes() in files for row in (*masks, *images))


def test_of_the_masks_nothing_is_on_the_disk(folder: Path) -> None:
    files = b"".join(path.read_bytes() for path in folder.iterdir())
    assert not any(row.numpy().tobytes() in files for group in range(3) for row in masks_of(folder, group, 200))
    assert isinstance(opened(folder).freivalds(0, 0), Freivalds)
    assert indices(folder, 0, opened(folder).masks(0, 7, 2)) == [7, 8]


def test_what_the_group_with_fewest_has_left(tmp_path: Path) -> None:
    with contextlib.closing(filled(tmp_path / "s", 100)) as store:
        assert store.fewest_left() == min(store.left(group) for group in range(3)) == 100
        store.take(1, 7)
        assert store.fewest_left() == store.left(1) == 93 and store.left(0) == 100
        store.take(2, 60)
        assert store.fewest_left() == store.left(2) == 40
