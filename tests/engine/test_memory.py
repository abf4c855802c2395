from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from cloven.engine import memory
from cloven.engine.memory import anonymous_bytes, available_bytes


def test_private_memory_grows_with_what_is_allocated() -> None:
    before = anonymous_bytes()
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # not from what malloc kept of earlier tests
        for page in range(0, len(held), 4096):
            held[page] = 1  # touched, so that the pages exist
        assert 60 * 2**20 < anonymous_bytes() - before < 80 * 2**20


def test_of_another_process() -> None:
    command = [sys.executable, "-c", "import sys; x = b'x' * 2**25; print('there', flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        assert 2**25 < anonymous_bytes(process.pid) < 2**28
        process.stdin.close()


def test_nobody_has_that_process() -> None:
    assert anonymous_bytes(2**30) == 0


def test_available_memory() -> None:
    assert 2**28 < available_bytes() < 2**50


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(memory.Path, "read_text", missing)
    assert anonymous_bytes() == 0
    assert available_bytes() > 2**28
