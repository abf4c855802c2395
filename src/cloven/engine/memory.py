"""Memory of processes, from /proc (Linux only; 0 elsewhere)."""

from __future__ import annotations

import os
from pathlib import Path


def _status(pid: int | str, field: str) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def anonymous_bytes(pid: int | str = "self") -> int:
    """Private memory that is not backed by a file, in bytes."""
    return _status(pid, "RssAnon")


def available_bytes() -> int:
    """Memory that new processes can have, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def file_mappings() -> list[tuple[int, int]]:
    """Address ranges of this process that a file on disk backs, from their first byte to that after their last."""
    ranges = []
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, _, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and path and not path[0].endswith(" (deleted)"):
                start, end = addresses.split("-")
                ranges.append((int(start, 16), int(end, 16)))
    except OSError:
        pass
    return ranges
