"""Small files that must survive a crash, and the folder for what is known of a store or a ledger outside of it."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path:
    """Where witnesses are: $CLOVEN_STATE, or cloven/ in the user's state folder."""
    given = os.environ.get("CLOVEN_STATE")
    return Path(given) if given else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cloven"


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file's contents, mode 0600: after a crash it holds the old bytes or the new ones, and after the return the new ones."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
