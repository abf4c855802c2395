from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cloven.bundle.durable import PARTIAL, read_small, state_folder, sync_folder, write_durably
from tests.pad_stores import Ending, Stop, stop


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"CLOVEN_STATE": "/a", "XDG_STATE_HOME": "/b"}, "/a"),
        ({"XDG_STATE_HOME": "/b"}, "/b/cloven"),
        ({"HOME": "/c"}, "/c/.local/state/cloven"),
        ({"HOME": "/c", "CLOVEN_STATE": "", "XDG_STATE_HOME": ""}, "/c/.local/state/cloven"),
    ],
)
def test_the_state_folder(environment: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLOVEN_STATE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert state_folder() == Path(place)


def test_only_the_owner_reads_it_and_nothing_is_left_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"older and longer")
    path.chmod(0o644)
    write_durably(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_order_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's bytes, then its name, then the folder: in another order a power cut could leave an empty file under the name."""
    path, steps = tmp_path / "a", []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append(("fsync", Path(f"/proc/self/fd/{descriptor}").resolve()))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        steps.append(("replace", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_durably(path, b"x")
    real = path.resolve()
    assert steps == [("fsync", real.with_name("a" + PARTIAL)), ("replace", path), ("fsync", real.parent)]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(3))
def test_whenever_it_ends_the_old_bytes_or_the_new_ones_are_there(
    at: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_durably(path, b"old")
    with monkeypatch.context() as patch:
        ending = Ending(patch.setattr, at, after, stop)
        with pytest.raises(Stop):
            write_durably(path, b"new")
        assert ending.reached
    assert path.read_bytes() == (b"new" if (at, after) >= (1, True) else b"old")
    write_durably(path, b"newer")
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_bytes_and_no_rubbish(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_durably(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(OSError, match="No space left"):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_a_process_that_died_has_left_is_replaced(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    (tmp_path / ("a" + PARTIAL)).symlink_to(elsewhere)  # or somebody has put there
    write_durably(path, b"new")
    path.unlink()
    path.symlink_to(elsewhere)
    write_durably(path, b"newer")
    assert path.read_bytes() == b"newer" and not path.is_symlink() and elsewhere.read_bytes() == b"precious"


def test_a_folder_is_synced(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")


def test_small_files_only(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10))
    assert read_small(path, 10) == bytes(10)
    with pytest.raises(ValueError, match="too large"):
        read_small(path, 9)


def test_nothing_but_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        read_small(tmp_path / "link", 10)
    os.mkfifo(tmp_path / "pipe")  # would wait for a writer, for ever
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises((ValueError, OSError)):
            read_small(place, 10)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "nowhere", 10)
