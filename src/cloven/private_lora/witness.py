"""The witness of a ledger: a small file outside the ledger's folder with its number and its last known generation.

A ledger that is older than its witness was restored from a backup, and has forgotten answers that were given.
"""

from __future__ import annotations

import fcntl
import json
import re
from dataclasses import dataclass
from pathlib import Path

from cloven.bundle.durable import state_folder, write_durably
from cloven.errors import LedgerUnusable

_MAX_WITNESS_BYTES = 65_536
_NUMBER = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Witness:
    """What is known of an adapter's ledger outside of it."""

    path: str
    number: str
    generation: int


def witness_path(adapter: str) -> Path:
    """The file of an adapter's witness."""
    return state_folder() / "ledgers" / f"{adapter}.json"


def read_witness(adapter: str) -> Witness | None:
    """The witness of an adapter's ledger, if there is one.

    Raises:
        LedgerUnusable: it cannot be read.
    """
    path = witness_path(adapter)
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MAX_WITNESS_BYTES else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerUnusable(f"{path}: the ledger's witness cannot be read; restore it, or ask whoever owns the adapter") from error
    if (
        not isinstance(record, dict)
        or set(record) != {"path", "number", "generation"}
        or not isinstance(record["path"], str)
        or not _NUMBER.fullmatch(str(record["number"]))
        or type(record["generation"]) is not int
    ):
        raise LedgerUnusable(f"{path}: the ledger's witness is malformed; restore it, or ask whoever owns the adapter")
    return Witness(**record)


def write_witness(adapter: str, path: Path, number: str, generation: int) -> None:
    """Note a generation, durably; only ever forwards: another process may have written a later one.

    Raises:
        LedgerUnusable: it cannot be written.
    """
    place = witness_path(adapter)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (place.parent / f"{adapter}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = read_witness(adapter)
            if known is not None and known.number == number and known.generation >= generation:
                return
            write_durably(place, json.dumps({"path": str(path), "number": number, "generation": generation}).encode())
    except OSError as error:
        raise LedgerUnusable(f"{place}: the ledger's witness cannot be written ({error.strerror}); nothing is served without it") from error
