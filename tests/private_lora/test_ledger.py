"""The ledger: nothing is answered that was not counted, whatever happens to files and processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.errors import BadInput, BudgetExhausted, LedgerUnusable
from cloven.private_lora import ledger as module
from cloven.private_lora.ledger import BLOCK, Account, Ledger, Standing, before, create_ledger, require_ledger_place
from cloven.private_lora.witness import read_witness, state_folder, write_witness

ADAPTER, OTHER = "a" * 64, "b" * 64
BUDGET, SHARE = 1000, 600
ROTATION = bytes(range(32))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A fresh ledger."""
    create_ledger(tmp_path / "ledger.sqlite", ADAPTER, BUDGET, SHARE, ROTATION)
    return tmp_path / "ledger.sqlite"


@contextlib.contextmanager
def opened(path: Path, adapter: str = ADAPTER) -> Iterator[Ledger]:
    with contextlib.closing(Ledger(path, adapter)) as ledger:
        yield ledger


def witness_file(adapter: str = ADAPTER) -> Path:
    return state_folder() / "ledgers" / f"{adapter}.json"


def charged(path: Path) -> dict[tuple[str, str], int]:
    with opened(path) as ledger:
        return {(account.matrix, account.client): account.rows for account in ledger.accounts()}


def refused(path: Path, match: str, adapter: str = ADAPTER) -> None:
    with pytest.raises(LedgerUnusable, match=match):
        Ledger(path, adapter)


# --- counting


def test_rows_are_reserved_in_blocks_and_given_back(path: Path) -> None:
    with opened(path) as ledger:
        ledger.charge("g", "c", 3)
        assert ledger.accounts() == [Account("g", "c", BLOCK)]
        ledger.charge("g", "c", BLOCK - 3)
        assert ledger.accounts() == [Account("g", "c", BLOCK)]
        ledger.charge("g", "c", 1)
        assert ledger.accounts() == [Account("g", "c", 2 * BLOCK)]
    assert charged(path) == {("g", "c"): BLOCK + 1}


def test_charged_before_the_answer_and_durably(path: Path) -> None:
    """Another reader sees the rows as soon as `charge` returns."""
    with opened(path) as ledger, contextlib.closing(sqlite3.connect(path)) as reader:
        ledger.charge("g", "c", 300)
        assert reader.execute("SELECT rows FROM charged").fetchall() == [(2 * BLOCK,)]


def test_the_last_rows(path: Path) -> None:
    with opened(path) as ledger:
        for client, rows in (("one", SHARE), ("two", BUDGET - SHARE)):
            for _ in range(rows):
                ledger.charge("g", client, 1)
            with pytest.raises(BudgetExhausted):
                ledger.charge("g", client, 1)
        ledger.charge("h", "one", SHARE)  # another group has a budget of its own
    assert charged(path) == {("g", "one"): SHARE, ("g", "two"): BUDGET - SHARE, ("h", "one"): SHARE}


def test_the_message_says_whose_budget(path: Path) -> None:
    with opened(path) as ledger:
        ledger.charge("g", "one", SHARE - 10)
        with pytest.raises(BudgetExhausted, match="this client's share of answers is used up"):
            ledger.charge("g", "one", 11)
        ledger.charge("g", "one", 10)
        with pytest.raises(BudgetExhausted, match="the budget of answers is used up, or too small for 401 rows"):
            ledger.charge("g", "two", 401)


def test_a_refused_charge_costs_nothing(path: Path) -> None:
    with opened(path) as ledger:
        with pytest.raises(BudgetExhausted):
            ledger.charge("g", "c", SHARE + 1)
        assert ledger.accounts() == []
        ledger.charge("g", "c", SHARE)


def test_other_limits_from_now_on(path: Path) -> None:
    with opened(path) as ledger:
        ledger.charge("g", "c", SHARE)
        ledger.set_budget(10, 5)
        assert ledger.budget() == (10, 5)
        with pytest.raises(BudgetExhausted, match="this client's share"):
            ledger.charge("g", "c", 1)
        ledger.set_budget(10_000, SHARE + 1)
        ledger.charge("g", "c", 1)
    assert charged(path) == {("g", "c"): SHARE + 1}


def test_a_closed_ledger_charges_nothing(path: Path) -> None:
    ledger = Ledger(path, ADAPTER)
    ledger.charge("g", "c", 1)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerUnusable, match="closed"):
        ledger.charge("g", "c", 1)


def test_a_ledger_that_was_not_closed_counts_too_much_never_too_little(path: Path) -> None:
    ledger = Ledger(path, ADAPTER)
    ledger.charge("g", "c", 3)
    assert charged(path) == {("g", "c"): BLOCK}
    ledger._database.close()


# --- lending


def test_what_is_lent_is_charged_and_comes_back(path: Path) -> None:
    with opened(path) as ledger:
        left = {"g": 0}
        with ledger.lending(lambda: [("g", "c", left.pop("g", 0))]):
            ledger.lend("g", "c", 3, lambda rows: left.update(g=rows))
            assert left["g"] == BLOCK and ledger.accounts() == [Account("g", "c", BLOCK)]
            left["g"] -= 3  # answered
        ledger.charge("g", "c", BLOCK - 3)  # from memory
        assert ledger.accounts() == [Account("g", "c", BLOCK)]
    assert charged(path) == {("g", "c"): BLOCK}


def test_others_get_what_is_lent_and_not_needed(path: Path) -> None:
    with opened(path) as ledger:
        ledger.set_budget(BLOCK, BLOCK)
        left = [0]

        def recall() -> list[tuple[str, str, int]]:
            rows, left[0] = left[0], 0
            return [("g", "one", rows)]

        with ledger.lending(recall):
            ledger.lend("g", "one", 1, lambda rows: left.__setitem__(0, rows - 1))
            ledger.charge("g", "two", BLOCK - 1)
            assert left == [0]
            with pytest.raises(BudgetExhausted):
                ledger.lend("g", "one", 1, lambda _: None)
    assert charged(path) == {("g", "one"): 1, ("g", "two"): BLOCK - 1}


def test_who_comes_and_goes_does_not_make_the_reserve_grow(path: Path) -> None:
    """No more than a block for every one that is there at once: that is what a crash can lose."""
    with opened(path) as ledger:
        ledger.set_budget(100 * BLOCK, 100 * BLOCK)
        for _ in range(10):
            with contextlib.ExitStack() as stack:
                for _ in range(2):
                    left = [0]
                    stack.enter_context(ledger.lending(lambda left=left: [("g", "c", left.pop())]))  # type: ignore[misc]
                    ledger.lend("g", "c", 1, lambda rows, left=left: left.__setitem__(0, rows - 1))  # type: ignore[misc]
                    assert left[0] < BLOCK
        assert ledger.accounts()[0].rows <= 3 * BLOCK
    assert charged(path) == {("g", "c"): 20}


def test_what_could_not_be_given_back_is_not_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked, say by a backup, when it was tried: nothing was written."""
    with opened(path) as ledger:
        ledger.charge("g", "one", 1)
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "_identity", lambda: (_ for _ in ()).throw(sqlite3.OperationalError("database is locked")))
            with pytest.raises(LedgerUnusable, match="locked"):
                ledger._give_back()
        ledger.charge("g", "one", 1)
        assert ledger.accounts() == [Account("g", "one", BLOCK)]
    assert charged(path) == {("g", "one"): 2}


def test_what_may_have_been_given_back_is_not_handed_out_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction is through, the witness is not: these rows are no longer charged."""
    with opened(path) as ledger:
        ledger.charge("g", "one", 1)
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_witness", lambda *_: (_ for _ in ()).throw(LedgerUnusable("the disk is full")))
            with pytest.raises(LedgerUnusable, match="the disk is full"):
                ledger._give_back()
        ledger.charge("g", "one", 1)
        assert ledger.accounts() == [Account("g", "one", 1 + BLOCK)]
    assert charged(path) == {("g", "one"): 2}


def test_a_ledger_that_closes_takes_back_what_is_lent(path: Path) -> None:
    ledger = Ledger(path, ADAPTER)
    left = [0]

    def recall() -> list[tuple[str, str, int]]:
        rows, left[0] = left[0], 0
        return [("g", "c", rows)]

    with ledger.lending(recall):
        ledger.lend("g", "c", 5, lambda rows: left.__setitem__(0, rows - 5))
        ledger.close()
        with pytest.raises(LedgerUnusable, match="closed"):
            ledger.lend("g", "c", 1, lambda _: None)
    assert charged(path) == {("g", "c"): 5}


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["charge", "charge", "charge", "close", "crash"]),
        st.sampled_from("xyz"),
        st.sampled_from("gh"),
        st.integers(1, 13),
    ),
    max_size=14,
)


@settings(max_examples=20)
@given(STEPS, st.integers(1, 40), st.integers(1, 40))
def test_any_interleaving_of_clients_and_servers(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str, str, str, int]], budget: int, share: int
) -> None:
    """Three servers on one ledger; some end, some die. Never more than the budget, nor a client's share; never less counted than given."""
    share = min(share, budget)
    adapter = f"{next(_adapters):064x}"
    path = tmp_path_factory.getbasetemp() / f"{adapter}.sqlite"
    create_ledger(path, adapter, budget, share, ROTATION)
    granted: Counter[tuple[str, str]] = Counter()
    crashed = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 5)
        servers = [Ledger(path, adapter) for _ in range(3)]
        for number, step, client, group, rows in steps:
            if step == "charge":
                before = servers[number].accounts()
                with contextlib.suppress(BudgetExhausted):
                    servers[number].charge(group, client, rows)
                    granted[group, client] += rows
                    continue
                after = {(account.matrix, account.client): account.rows for account in servers[number].accounts()}
                for account in before:  # a refusal charges nothing; what others reserved may have been given back
                    key = (account.matrix, account.client)
                    assert granted[key] <= after[key] <= account.rows
            else:
                if step == "crash":
                    servers[number]._database.close()
                    crashed = True
                else:
                    servers[number].close()
                servers[number] = Ledger(path, adapter)
            for of_group in "gh":
                assert sum(count for (g, _), count in granted.items() if g == of_group) <= budget
        for server in servers:
            server.close()
        with opened(path, adapter) as ledger:
            counted = {(account.matrix, account.client): account.rows for account in ledger.accounts()}
    for key, count in granted.items():
        assert count <= counted[key] <= share
    for of_group in "gh":
        assert sum(count for (group, _), count in counted.items() if group == of_group) <= budget
    if not crashed:
        assert {key: count for key, count in counted.items() if count} == dict(granted)


_adapters = itertools.count()


def test_clients_that_come_once_do_not_use_up_the_budget(path: Path) -> None:
    """Rows that this very process has reserved for one client and not answered are free for another."""
    with opened(path) as ledger:
        for number in range(10):  # 10 rows of 1000
            ledger.charge("g", f"client {number}", 1)


def test_eight_threads_on_two_servers(path: Path) -> None:
    granted: Counter[str] = Counter()
    lock = threading.Lock()
    with opened(path) as one, opened(path) as two:

        def ask(number: int) -> None:
            ledger, client = (one, two)[number % 2], f"c{number % 3}"
            for i in range(40):
                with contextlib.suppress(BudgetExhausted):
                    ledger.charge("g", client, 1 + i % 5)
                    with lock:
                        granted[client] += 1 + i % 5

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    counted = charged(path)
    assert sum(granted.values()) <= BUDGET and max(granted.values()) <= SHARE
    assert {key: rows for key, rows in counted.items() if rows} == {("g", client): rows for client, rows in granted.items()}


# --- files: whatever is not the ledger as it was last known is refused


def test_what_is_on_disk(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(witness_file().read_text(encoding="utf-8")) == {
        "path": str(path),
        "number": read_witness(ADAPTER).number,  # type: ignore[union-attr]
        "generation": 1,
    }
    assert witness_file().parent.stat().st_mode & 0o777 == 0o700
    with opened(path) as ledger:
        ledger.charge("g", "c", 1)
        assert read_witness(ADAPTER).generation == 2  # type: ignore[union-attr]
    assert read_witness(ADAPTER).generation == 3  # type: ignore[union-attr]


def test_where_witnesses_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "cloven-tests-" in str(state_folder())
    monkeypatch.delenv("CLOVEN_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "cloven"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_folder() == Path.home() / ".local" / "state" / "cloven"


def test_a_missing_ledger(path: Path) -> None:
    path.unlink()
    refused(path, "the ledger is missing: restore it")
    assert not path.exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "header", "page", "table", "a folder"])
def test_a_corrupt_ledger(damage: str, path: Path) -> None:
    with opened(path) as ledger:
        for group in range(300):
            ledger.charge(f"group number {group:050}", "c", 1)
    data = bytearray(path.read_bytes())
    assert len(data) > 3 * 4096
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "table":
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute("DROP TABLE ledger")
    else:
        if damage == "empty":
            data.clear()
        elif damage == "truncated":
            del data[len(data) // 2 :]
        elif damage == "garbage":
            data[:] = bytes(range(256)) * (len(data) // 256)
        elif damage == "header":
            data[:16] = b"x" * 16
        else:
            data[2 * 4096 : 3 * 4096] = b"\x5a" * 4096
        path.write_bytes(data)
    refused(path, "ledger")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET format = 2",
        "DELETE FROM ledger",
        "INSERT INTO ledger SELECT * FROM ledger",
        f"UPDATE ledger SET adapter = '{OTHER}'",
        "UPDATE ledger SET number = '0'",
        "UPDATE ledger SET number = NULL",
        "UPDATE ledger SET generation = 0",
    ],
)
def test_a_ledger_that_says_something_else(statement: str, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)
    refused(path, "ledger")


def test_the_ledger_of_another_adapter(path: Path) -> None:
    refused(path, "the ledger of another adapter", OTHER)
    create_ledger(path.with_name("other.sqlite"), OTHER, BUDGET, SHARE, ROTATION)
    refused(path, "the ledger of another adapter", OTHER)


def test_another_ledger_of_the_same_adapter(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made under another state folder, on another machine say, and brought here: it forgets what this one counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOVEN_STATE", str(tmp_path / "elsewhere"))
        create_ledger(tmp_path / "fresh.sqlite", ADAPTER, BUDGET, SHARE, ROTATION)
    refused(tmp_path / "fresh.sqlite", f"not the adapter's ledger, which is at {path}")
    shutil.copyfile(tmp_path / "fresh.sqlite", path)
    refused(path, "not the adapter's ledger")


def test_a_ledger_restored_from_a_backup(path: Path, tmp_path: Path) -> None:
    with opened(path) as ledger:
        ledger.charge("g", "c", 10)
    shutil.copyfile(path, tmp_path / "backup")
    with opened(path) as ledger:
        ledger.charge("g", "c", 500)
    shutil.copyfile(path, tmp_path / "newer")
    shutil.copyfile(tmp_path / "backup", path)
    refused(path, r"older than its last known state \(generation 3, known 5\)")
    shutil.copyfile(tmp_path / "newer", path)  # the last state is fine wherever it comes from
    assert charged(path) == {("g", "c"): 510}


def test_a_backup_that_is_restored_under_a_running_server(path: Path, tmp_path: Path) -> None:
    shutil.copyfile(path, tmp_path / "backup")
    ledger = Ledger(path, ADAPTER)
    ledger.charge("g", "c", 100)
    path.write_bytes((tmp_path / "backup").read_bytes())
    with pytest.raises(LedgerUnusable):
        ledger.charge("g", "c", BLOCK)
    with contextlib.suppress(LedgerUnusable):
        ledger.close()
    refused(path, "older than its last known state")


def test_a_moved_ledger_is_fine(path: Path, tmp_path: Path) -> None:
    path.rename(tmp_path / "moved.sqlite")
    with opened(tmp_path / "moved.sqlite") as ledger:
        ledger.charge("g", "c", 1)
    witness = read_witness(ADAPTER)
    assert witness is not None and witness.path == str(tmp_path / "moved.sqlite")


def test_a_ledger_that_was_moved_is_gone_on_with(path: Path, tmp_path: Path) -> None:
    """A new bundle after OUT was moved, before the moved server ever answered."""
    path.rename(tmp_path / "moved.sqlite")
    create_ledger(tmp_path / "moved.sqlite", ADAPTER, 5, 5, ROTATION)
    with opened(tmp_path / "moved.sqlite") as ledger:
        assert ledger.budget() == (5, 5)


# --- the witness


def test_a_missing_witness(path: Path) -> None:
    witness_file().unlink()
    refused(path, "the ledger's witness .* is missing")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 5000,
        b"x" * 70_000,
        b" " * 70_000,
        b'{"path": "x", "number": "0", "generation": 1}',
        b'{"path": 3, "number": "00000000000000000000000000000000", "generation": 1}',
        b'{"path": "x", "number": "00000000000000000000000000000000", "generation": "1"}',
        b'{"path": "x", "number": "00000000000000000000000000000000", "generation": true}',
        b'{"path": "x", "number": "00000000000000000000000000000000"}',
        b'{"path": "x", "number": "00000000000000000000000000000000", "generation": 1, "more": 1}',
    ],
    ids=lambda content: str(content[:70]),
)
def test_a_malformed_witness(content: bytes, path: Path) -> None:
    witness_file().write_bytes(content)
    refused(path, "the ledger's witness (is malformed|cannot be read)")
    with pytest.raises(LedgerUnusable):
        create_ledger(path.with_name("new.sqlite"), ADAPTER, BUDGET, SHARE, ROTATION)
    assert not path.with_name("new.sqlite").exists()


FIELDS = st.sampled_from(["path", "number", "generation"])
JSON = st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner))


@settings(max_examples=60)
@given(st.binary(max_size=90) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_witness_is_read_or_refused(content: bytes) -> None:
    witness_file(OTHER).parent.mkdir(parents=True, exist_ok=True)
    witness_file(OTHER).write_bytes(content)
    with contextlib.suppress(LedgerUnusable):
        read_witness(OTHER)


def test_a_witness_only_goes_forwards(path: Path) -> None:
    number = read_witness(ADAPTER).number  # type: ignore[union-attr]
    write_witness(ADAPTER, path, number, 9)
    write_witness(ADAPTER, path, number, 4)
    assert read_witness(ADAPTER).generation == 9  # type: ignore[union-attr]


def test_no_answer_without_the_witness(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be written: the rows are counted, and nothing is granted."""
    with opened(path) as ledger:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("cloven.private_lora.witness.write_durably", full)
            with pytest.raises(LedgerUnusable, match=r"cannot be written .No space left"):
                ledger.charge("g", "c", 1)
        assert ledger.accounts() == [Account("g", "c", BLOCK)]
        ledger.charge("g", "c", 1)
        assert ledger.accounts() == [Account("g", "c", 2 * BLOCK)]


def test_a_crash_between_ledger_and_witness(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path, ADAPTER)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_witness", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ledger.charge("g", "c", 1)
    ledger._database.close()
    assert charged(path) == {("g", "c"): BLOCK}  # newer than its witness: fine


# --- creation


def test_a_ledger_is_made_once(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"has a ledger already: give --ledger {path}"):
        create_ledger(tmp_path / "another.sqlite", ADAPTER, BUDGET, SHARE, ROTATION)
    assert not (tmp_path / "another.sqlite").exists()


def test_a_vanished_ledger_is_not_made_anew(path: Path, tmp_path: Path) -> None:
    path.unlink()
    for place in (path, tmp_path / "another.sqlite"):
        with pytest.raises(BadInput, match="is missing: restore it, because what it counted was given away"):
            require_ledger_place(place, ADAPTER)
        with pytest.raises(BadInput):
            create_ledger(place, ADAPTER, BUDGET, SHARE, ROTATION)


def test_going_on_with_a_ledger_keeps_its_counts(path: Path) -> None:
    with opened(path) as ledger:
        ledger.charge("g", "c", 123)
    create_ledger(path, ADAPTER, 2000, 1500, ROTATION)
    assert charged(path) == {("g", "c"): 123}
    with opened(path) as ledger:
        assert ledger.budget() == (2000, 1500)


def test_a_ledger_by_another_path(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.sqlite").symlink_to(path)
    create_ledger(tmp_path / "link.sqlite", ADAPTER, 77, 7, ROTATION)
    with opened(path) as ledger:
        assert ledger.budget() == (77, 7)


def test_a_strange_file_in_the_ledgers_place(tmp_path: Path) -> None:
    (tmp_path / "l.sqlite").write_bytes(b"somebody's notes")
    with pytest.raises(LedgerUnusable):
        create_ledger(tmp_path / "l.sqlite", ADAPTER, BUDGET, SHARE, ROTATION)
    assert (tmp_path / "l.sqlite").read_bytes() == b"somebody's notes"


# --- several processes


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


_LOCK = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_ledger_locked_by_another_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.1)
    ledger = Ledger(path, ADAPTER)
    with started(_LOCK, str(path)) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        refused(path, "is locked by another program")
        with pytest.raises(LedgerUnusable, match="is locked by another program"):
            ledger.charge("g", "c", 1)
        other.communicate("")
    ledger.charge("g", "c", 1)
    ledger.close()
    assert charged(path) == {("g", "c"): 1}


_CHARGE = """
import sys
from pathlib import Path
from cloven.errors import BudgetExhausted
from cloven.private_lora import ledger
ledger.BLOCK = 16
book, granted = ledger.Ledger(Path(sys.argv[1]), "a" * 64), 0
print("ready", flush=True)
sys.stdin.readline()
try:
    while True:
        book.charge("g", sys.argv[2], 7)
        granted += 7
        if sys.argv[3] == "report":
            print(granted, flush=True)
except BudgetExhausted:
    pass
book.close()
print("granted", granted)
"""


def test_two_processes_share_a_budget(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(_CHARGE, str(path), client, "quiet")) for client in ("one", "two")]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        granted = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            out, _ = process.communicate(timeout=60)
            granted.append(int(out.split()[-1]))
    assert sum(granted) <= BUDGET and max(granted) <= SHARE and min(granted) > 0
    assert charged(path) == {("g", "one"): granted[0], ("g", "two"): granted[1]}
    assert sum(granted) > BUDGET - 2 * 16


@pytest.mark.parametrize("reports", [1, 20, pytest.param(45, marks=pytest.mark.long)])
def test_a_killed_process_never_counts_too_little(reports: int, path: Path) -> None:
    with started(_CHARGE, str(path), "c", "report") as process:
        assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        granted = [int(process.stdout.readline()) for _ in range(reports)][-1]
        os.kill(process.pid, signal.SIGKILL)
        rest: list[Any] = [line for line in process.stdout.read().split("\n") if line.isdigit()]
    granted = int(rest[-1]) if rest else granted
    counted = charged(path)["g", "c"]
    assert granted <= counted <= SHARE


def test_no_rows_or_numbers_in_a_repr(path: Path) -> None:
    with opened(path) as ledger:
        ledger.charge("g", "client", 1)
        witness = read_witness(ADAPTER)
        assert witness is not None and witness.number not in repr(ledger) and "client" not in repr(ledger)


def test_a_group_is_charged_to_all_its_matrices(path: Path) -> None:
    """Another bundle of the adapter may group them otherwise: a matrix has one budget however it is asked."""
    with opened(path) as ledger:
        ledger.charge("q+k+v", "x", 300)
        ledger.charge("gate+up", "x", 10)
    with opened(path) as ledger:
        assert {account.matrix: account.rows for account in ledger.accounts()} == {"q": 300, "k": 300, "v": 300, "gate": 10, "up": 10}
        with pytest.raises(BudgetExhausted):
            ledger.charge("q+k+v+gate+up", "x", SHARE - 299)
        ledger.charge("q+k+v+gate+up", "x", SHARE - 300)


def test_a_forked_child_can_neither_hand_out_nor_give_back(path: Path) -> None:
    with opened(path) as ledger:
        ledger.charge("g", "x", 1)
        child = os.fork()
        if child == 0:
            refused = 0
            with contextlib.suppress(BaseException):
                for act in (lambda: ledger.charge("g", "x", 1), lambda: ledger.set_budget(1, 1)):
                    try:
                        act()
                    except LedgerUnusable as error:
                        refused += "forked" in str(error)
                ledger.close()
            os._exit(refused)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 2
        ledger.charge("g", "x", BLOCK - 1)  # still the parent's
        assert ledger.accounts() == [Account("g", "x", BLOCK)]


def test_what_others_used_is_not_told(path: Path) -> None:
    with opened(path) as ledger:
        ledger.charge("g", "alice", 600)
        with pytest.raises(BudgetExhausted) as error:
            ledger.charge("g", "bob", 401)
        assert "400" not in str(error.value) and "600" not in str(error.value)


def test_the_rotation_key_is_kept(path: Path) -> None:
    assert before(path, ADAPTER) == (ROTATION, BUDGET)
    absent = path.with_name("absent.sqlite")
    assert before(absent, ADAPTER)[0] != before(absent, ADAPTER)[0] and before(absent, ADAPTER)[1] is None


# --- what is left, for metrics


def test_what_is_left(path: Path) -> None:
    with opened(path) as ledger:
        assert ledger.standing() == Standing(BUDGET, BUDGET, {})
        ledger.charge("q+k", "one", 10)
        ledger.charge("q+k", "two", 300)
        ledger.charge("o", "one", 1)
        assert ledger.standing() == Standing(BUDGET, BUDGET - 3 * BLOCK, {"one": SHARE - BLOCK, "two": SHARE - 2 * BLOCK})
    with opened(path) as ledger:  # what was reserved and not used came back
        assert ledger.standing() == Standing(BUDGET, BUDGET - 310, {"one": SHARE - 10, "two": SHARE - 300})
        ledger.set_budget(100, 50)
        assert ledger.standing() == Standing(100, 0, {"one": 40, "two": 0})  # never less than nothing
    with pytest.raises(LedgerUnusable, match="closed"):
        ledger.standing()


def test_what_is_left_of_a_ledger_that_broke(path: Path) -> None:
    with opened(path) as ledger:
        ledger._database.execute("DROP TABLE charged")
        with pytest.raises(LedgerUnusable, match="cannot be used"):
            ledger.standing()


def test_what_is_left_while_it_is_charged(path: Path) -> None:
    """From another thread, on the same connection."""
    with opened(path) as ledger:
        ledger.set_budget(10**6, 10**6)
        ended, seen = threading.Event(), list[int]()

        def look() -> None:
            while not ended.is_set():
                seen.append(ledger.standing().left)

        looker = threading.Thread(target=look)
        looker.start()
        for _ in range(20):
            ledger.charge("q", "one", BLOCK)
        ended.set()
        looker.join(10)
        assert seen == sorted(seen, reverse=True) and ledger.standing().left == 10**6 - 20 * BLOCK
        assert all((10**6 - left) % BLOCK == 0 for left in seen)  # nothing half done is seen
