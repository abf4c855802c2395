"""Ledgers that nobody needs afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def ledgers_in(folder: Path) -> Iterator[None]:
    """Keep what ledgers leave behind in a folder that will vanish: a demo's or a benchmark's answers go to nobody."""
    before = os.environ.get("CLOVEN_STATE")
    os.environ["CLOVEN_STATE"] = str(folder / "state")
    try:
        yield
    finally:
        os.environ.pop("CLOVEN_STATE")
        if before is not None:
            os.environ["CLOVEN_STATE"] = before
