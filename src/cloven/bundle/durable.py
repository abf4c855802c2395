"""Small files that must survive a crash, and the folder for what is known of a store or a ledger outside of it."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

PARTIAL = ".partial"  # added to the name of a file that is being replaced


def state_folder() -> Path:
    """Where witnesses are: $CLOVEN_STATE, or cloven/ in the user's state folder."""
    given = os.environ.get("CLOVEN_STATE")
    return Path(given) if given else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cloven"


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file's contents, mode 0600: after a crash it holds the old bytes or the new ones, and after the return the new ones."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_small(path: Path, most: int) -> bytes:
    """The contents of a file of at most `most` bytes that is no symbolic link.

    Raises:
        OSError: it cannot be read.  ValueError: it is larger, or no file.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:  # a pipe would wait for its writer
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError("too large")
    return data


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
