"""The ledger: how many answers an adapter has given, over all clients and per client, durably.

Whoever may use a linear map may learn it: Q answers of b bits reveal at most Q·b bits of every row. The ledger is what limits Q.

    unit      one row of a query for one matrix; a query for a group of matrices is charged to all of them
    charge    rows are reserved in blocks of 256 in one SQLite transaction (synchronous, before the answer is computed); a process hands
              its reserved rows out from memory, lends them to its lanes (`lane_answers`), and gives back what is left of them at its
              end, or when other clients of this process need it
    rotation  the secret key of the adapter's rotations, here because it must be the same for every bundle of the adapter
    witness   a small file outside the ledger's folder with the ledger's number and generation, which grows with every charge: a ledger
              that is missing, older than the witness (restored from a backup), or another adapter's is refused

The order is: ledger, witness, answer. A crash in between loses at most a block of a matrix for every client and every lane, and never
counts too little. Processes on one host may share a ledger. Not detected: a machine that is set back as a whole, ledger and witness alike;
and an owner who deletes both.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloven.errors import BadInput, BudgetExhausted, LedgerUnusable
from cloven.field.prg import KEY_BYTES
from cloven.private_lora.witness import read_witness, witness_path, write_witness
from cloven.telemetry import logger

FORMAT = 1
BLOCK = 256
Recall = Callable[[], Iterable[tuple[str, str, int]]]  # of rows that were lent and not answered: (group, client, how many)
_WAIT_SECONDS = 5.0
_SCHEMA = """
CREATE TABLE ledger (format INTEGER, adapter TEXT, number TEXT, generation INTEGER, budget INTEGER, share INTEGER, rotation BLOB);
CREATE TABLE charged (matrix TEXT, client TEXT, rows INTEGER NOT NULL CHECK (rows >= 0), PRIMARY KEY (matrix, client)) WITHOUT ROWID;
"""


def require_ledger_place(path: Path, adapter: str) -> None:
    """Refuse a place for an adapter's ledger where there is another one.

    Raises:
        BadInput: the adapter has a ledger elsewhere, or its ledger has vanished.
    """
    known = read_witness(adapter)
    if known is None or path.exists():  # `Ledger` compares its number and generation with the witness's
        return
    if not Path(known.path).exists():
        raise BadInput(
            f"this adapter has a ledger, at {known.path}, which is missing: restore it, because what it counted was given away; "
            f"if it never answered a client, remove {witness_path(adapter)}"
        )
    raise BadInput(f"this adapter has a ledger already: give --ledger {known.path}, so that nothing is forgotten")


def before(path: Path, adapter: str) -> tuple[bytes, int | None]:
    """What a preparation goes on with: rotation key and budget of the adapter's ledger at `path`, or a fresh key and None."""
    if not path.exists():
        return secrets.token_bytes(KEY_BYTES), None
    with contextlib.closing(Ledger(path, adapter)) as ledger:
        return ledger.rotation_key(), ledger.budget()[0]


def create_ledger(path: Path, adapter: str, budget: int, share: int, rotation: bytes) -> None:
    """Create the ledger of an adapter, or go on with the one at `path`, whose budgets are then set anew and whose counts stay.

    Args:
        rotation: see `before`.

    Raises:
        BadInput: the adapter has a ledger elsewhere.  LedgerUnusable: see `Ledger`.
    """
    require_ledger_place(path, adapter)
    if path.exists():
        with contextlib.closing(Ledger(path, adapter)) as ledger:
            ledger.set_budget(budget, share)
        return
    number = secrets.token_hex(16)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous=EXTRA")
        database.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.strip().split(";")[:-1]:
            database.execute(statement)
        database.execute("INSERT INTO ledger VALUES (?, ?, ?, 1, ?, ?, ?)", (FORMAT, adapter, number, budget, share, rotation))
        database.execute("COMMIT")
    try:
        write_witness(adapter, path, number, 1)
    except LedgerUnusable:
        path.unlink()  # nobody has asked anything yet
        raise


@dataclass(frozen=True)
class Account:
    """Rows of one matrix charged to one client."""

    matrix: str
    client: str
    rows: int


@dataclass(frozen=True)
class Standing:
    """Rows of the budget; what is left of them for all clients, and of the share of each that was charged: of the matrix used most."""

    budget: int
    left: int
    clients: dict[str, int]


class Ledger:
    """An open ledger.

    Args:
        path: the SQLite file, which `create_ledger` made.
        adapter: SHA-256 of the adapter's weights.

    Raises:
        LedgerUnusable: missing, corrupt, locked, another adapter's, or older than its witness.

    Guarantee: over all processes, clients and restarts, no more rows of a matrix are handed out by `charge` and `lend` than the budget, nor
    to one client more than its share. A forked child is refused: it would hand out what its parent reserved.
    """

    def __init__(self, path: Path, adapter: str) -> None:
        self._path, self.adapter = path, adapter
        self._reserved: dict[tuple[str, str], int] = {}
        self._recalls: list[Recall] = []
        self._untouched = True
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        if not path.is_file():
            raise LedgerUnusable(f"{path}: the ledger is missing: restore it; it is made only by `cloven prepare private-lora`")
        try:
            self._database = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._database.execute("PRAGMA synchronous=EXTRA")
                with self._transaction():  # the write lock: a ledger that cannot be charged is not opened
                    problem = self._database.execute("PRAGMA quick_check").fetchone()[0]
                    if problem != "ok":
                        raise LedgerUnusable(f"{path}: the ledger is corrupt; restore it, nothing is served without it")
                    self._number, _ = self._identity()
            except BaseException:
                self._database.close()
                raise
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._untouched = True  # the database, should this fail
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._untouched = False
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _unusable(self, error: sqlite3.Error) -> LedgerUnusable:
        locked = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
        what = "is locked by another program" if locked else f"cannot be used ({type(error).__name__})"
        return LedgerUnusable(f"{self._path}: the ledger {what}; nothing is served without it")

    def _identity(self) -> tuple[str, int]:
        """The ledger's number and generation, checked against the adapter and the witness."""
        rows: list[Any] = self._database.execute("SELECT format, adapter, number, generation FROM ledger").fetchall()
        if len(rows) != 1 or rows[0][0] != FORMAT:
            raise LedgerUnusable(f"{self._path}: not a ledger of format {FORMAT}")
        _, adapter, number, generation = rows[0]
        if adapter != self.adapter:
            raise LedgerUnusable(f"{self._path}: this is the ledger of another adapter")
        witness = read_witness(adapter)
        if witness is None:
            raise LedgerUnusable(
                f"{self._path}: the ledger's witness {witness_path(adapter)} is missing: move it along when the server moves "
                "(or set CLOVEN_STATE)"
            )
        if witness.number != number:
            raise LedgerUnusable(f"{self._path}: this is not the adapter's ledger, which is at {witness.path}")
        if generation < witness.generation:
            raise LedgerUnusable(
                f"{self._path}: the ledger is older than its last known state (generation {generation}, known {witness.generation}): "
                "it was restored from a backup; answers that it forgot were given"
            )
        return number, generation

    def rotation_key(self) -> bytes:
        """32 secret bytes from which every bundle of the adapter draws its rotations; see `factors`."""
        row: tuple[bytes] = self._database.execute("SELECT rotation FROM ledger").fetchone()
        return row[0]

    def budget(self) -> tuple[int, int]:
        """The rows that all clients, and one client, may have of a matrix."""
        row: tuple[int, int] = self._database.execute("SELECT budget, share FROM ledger").fetchone()
        return row

    def set_budget(self, budget: int, share: int) -> None:
        """The owner's decision: other limits from now on; what was charged stays charged."""
        with self._lock:
            self._change(lambda: self._database.execute("UPDATE ledger SET budget = ?, share = ?", (budget, share)))

    def charge(self, group: str, client: str, rows: int) -> None:
        """Account for rows before they are answered.

        Args:
            group: names of the matrices that answer, joined by "+".

        Raises:
            BudgetExhausted: too few are left, for this client or for all; nothing was charged.
            LedgerUnusable: it may have been charged, but nothing may be answered.
        """
        with self._lock:
            self._charge(group, client, rows)

    @contextlib.contextmanager
    def lending(self, recall: Recall) -> Iterator[None]:
        """While rows are lent: `recall` takes back what is not answered of them, when others need it, and at the end."""
        with self._lock:
            self._recalls.append(recall)
        try:
            yield
        finally:
            with self._lock:
                self._recalls.remove(recall)
                self._take_back(recall)

    def lend(self, group: str, client: str, rows: int, to: Callable[[int], None]) -> None:
        """Account for rows, and with them for others that are reserved for this client, up to a block. See `lending`.

        Args:
            to: takes their number, and with it the right to answer so many.

        Raises:
            BudgetExhausted, LedgerUnusable: as of `charge`.
        """
        with self._lock:
            self._charge(group, client, rows)
            more = min(self._reserved[group, client], max(0, BLOCK - rows))
            self._reserved[group, client] -= more
            to(rows + more)

    def _charge(self, group: str, client: str, rows: int) -> None:
        self._require_mine()
        missing = rows - self._reserved.get((group, client), 0)
        if missing > 0:
            try:
                granted = self._reserve(group, client, missing)
            except BudgetExhausted:  # other clients of this process may hold rows that they do not need
                self._give_back()
                granted, missing = self._reserve(group, client, rows), rows
            self._reserved[group, client] = rows - missing + granted
        self._reserved[group, client] -= rows

    def _take_back(self, recall: Recall) -> None:
        for group, client, rows in recall():
            self._reserved[group, client] = self._reserved.get((group, client), 0) + rows

    def _reserve(self, group: str, client: str, missing: int) -> int:
        wanted = -(-missing // BLOCK) * BLOCK
        granted = 0

        def reserve() -> None:
            nonlocal granted
            granted = wanted
            for matrix in group.split("+"):
                for_all, for_one = self._left(matrix, client)
                granted = min(granted, for_all, for_one)
                if granted < missing:  # how much the others have used is not this client's business
                    logger.info("%s: refused %d rows; left are %d, for this client %d", matrix, missing, for_all, for_one)
                    whose = "this client's share" if for_one < for_all else "the budget"
                    raise BudgetExhausted(f"{whose} of answers is used up, or too small for {missing} rows")
            self._add(group, client, granted)

        self._change(reserve)
        return granted

    def _left(self, matrix: str, client: str) -> tuple[int, int]:
        """Rows of a matrix that are left for all clients, and for this one."""
        budget, share = self.budget()
        accounts = self._database.execute("SELECT client, rows FROM charged WHERE matrix = ?", (matrix,)).fetchall()
        return budget - sum(rows for _, rows in accounts), share - dict(accounts).get(client, 0)

    def _add(self, group: str, client: str, rows: int) -> None:
        self._database.executemany(
            "INSERT INTO charged VALUES (?, ?, ?) ON CONFLICT (matrix, client) DO UPDATE SET rows = rows + excluded.rows",
            [(matrix, client, rows) for matrix in group.split("+")],
        )

    def _change(self, operation: Any) -> None:
        """One transaction and one more generation; the witness follows before anything is answered."""
        self._require_mine()
        try:
            with self._transaction():
                _, generation = self._identity()
                operation()
                self._database.execute("UPDATE ledger SET generation = ?", (generation + 1,))
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        write_witness(self.adapter, self._path, self._number, generation + 1)

    def accounts(self) -> list[Account]:
        """What is charged, reserved rows of running servers included."""
        rows = self._database.execute("SELECT matrix, client, rows FROM charged ORDER BY matrix, client").fetchall()
        return [Account(*row) for row in rows]

    def standing(self) -> Standing:
        """What is left, reserved rows of running servers counted as used; from any thread.

        Raises:
            LedgerUnusable: closed, locked or corrupt.
        """
        with self._lock:
            self._require_mine()
            try:
                budget, share = self.budget()
                used = "SELECT MAX(used) FROM (SELECT SUM(rows) AS used FROM charged GROUP BY matrix)"
                most: int = self._database.execute(used).fetchone()[0] or 0
                clients = self._database.execute("SELECT client, MAX(rows) FROM charged GROUP BY client").fetchall()
            except sqlite3.Error as error:
                raise self._unusable(error) from error
        return Standing(budget, max(0, budget - most), {client: max(0, share - rows) for client, rows in clients})

    def close(self) -> None:
        """Give back what was reserved and not answered, and close."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            try:
                self._give_back()
            finally:
                self._closed = True
                self._database.close()

    def _require_mine(self) -> None:
        if self._closed:
            raise LedgerUnusable(f"{self._path}: the ledger is closed")
        if os.getpid() != self._pid:
            raise LedgerUnusable(f"{self._path}: this process was forked from the one that opened the ledger: open it anew")

    def _give_back(self) -> None:
        """Undo the charge of rows that are reserved or lent, and not answered."""
        for recall in self._recalls:
            self._take_back(recall)
        reserved, self._reserved = self._reserved, {}  # before the transaction: what may have been written stays charged
        unused = [(rows, matrix, client) for (group, client), rows in reserved.items() if rows for matrix in group.split("+")]
        if not unused:
            return
        statement, self._untouched = "UPDATE charged SET rows = rows - ? WHERE matrix = ? AND client = ?", True
        try:
            self._change(lambda: self._database.executemany(statement, unused))
        except LedgerUnusable:
            if self._untouched:
                self._reserved = reserved
            raise
