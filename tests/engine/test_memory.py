from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cloven.engine import memory
from cloven.engine.memory import anonymous_bytes, available_bytes, file_mappings


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
    assert file_mappings() == []


def test_what_a_file_backs(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(bytes(8192))  # a space in its name
    with (tmp_path / "a b").open("rb") as file:
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
    anonymous = np.ones(2**22, dtype=np.uint8)

    def is_mapped(array: np.ndarray) -> bool:
        address = array.__array_interface__["data"][0]
        return any(start <= address < end for start, end in file_mappings())

    assert is_mapped(mapped) and not is_mapped(anonymous)
    (tmp_path / "a b").unlink()
    assert not is_mapped(mapped)  # what is deleted, and lives in memory only, counts as private
