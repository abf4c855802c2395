from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path

import pytest

from cloven.bundle.partial_folder import partial_folder, require_new
from cloven.errors import BadInput, RunError


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(out: Path) -> None:
    with partial_folder(out) as partial:
        (partial / "a").write_text("a")


def test_it_appears_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with partial_folder(out) as partial:
        assert partial == tmp_path / "deep" / "er" / ".out.partial" and not out.exists()
        assert stat.S_IMODE(partial.stat().st_mode) == 0o700
        (partial / "exposed").mkdir()
        (partial / "exposed" / "a").write_text("a")
    assert listing(tmp_path) == ["deep", "deep/er", "deep/er/out", "deep/er/out/exposed", "deep/er/out/exposed/a"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_an_empty_out_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    require_new(tmp_path / "out")
    write(tmp_path / "out")
    assert listing(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), BadInput("x"), GeneratorExit()])
def test_it_vanishes_otherwise(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), partial_folder(tmp_path / "out") as partial:
        (partial / "secret").write_text("key")
        raise error
    assert listing(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RunError("the shard writer failed")])
def test_failures_say_where_and_that_nothing_is_left(tmp_path: Path, error: Exception) -> None:
    expected = r"out: (No space left on device|the shard writer failed); nothing was left behind"
    with pytest.raises(RunError, match=expected), partial_folder(tmp_path / "out"):
        raise error
    assert listing(tmp_path) == []


def test_what_an_earlier_run_left_is_removed(tmp_path: Path) -> None:
    partial, victim = tmp_path / ".out.partial", tmp_path / "victim"
    victim.mkdir()
    (victim / "letter").write_text("dear")
    (partial / "trusted").mkdir(parents=True)
    (partial / "trusted" / "keys").write_text("old")
    (partial / "link").symlink_to(victim)
    (partial / ".cloven-partial").touch()
    partial.chmod(0o755)
    write(tmp_path / "out")
    assert listing(tmp_path) == ["out", "out/a", "victim", "victim/letter"]


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_something_else_in_the_way(tmp_path: Path, kind: str) -> None:
    partial, victim = tmp_path / ".out.partial", tmp_path / "victim"
    victim.mkdir()
    (victim / "letter").write_text("dear")
    if kind == "file":
        partial.write_text("dear")
    elif kind == "link":
        partial.symlink_to(victim)
    else:
        partial.mkdir()
        (partial / "letter").write_text("dear")
    before = listing(tmp_path)
    with pytest.raises(BadInput, match="partial"):
        write(tmp_path / "out")
    assert listing(tmp_path) == before


def test_two_at_a_time(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("first")
        with pytest.raises(BadInput, match="another `cloven prepare`"):
            write(tmp_path / "out")
        assert (partial / "a").read_text() == "first"
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_a_lock_held_by_somebody_else(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    lock = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another `cloven prepare`"):
            write(tmp_path / "out")
    finally:
        os.close(lock)
    write(tmp_path / "out")  # an empty one is nobody's


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="cannot be written beside"):
        write(tmp_path / "file" / "out")


@pytest.mark.parametrize("content", ["file", "folder", "other"])
def test_an_out_that_holds_something(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_text("x")
    else:
        out.mkdir()
        (out / "a").mkdir() if content == "folder" else (out / ".hidden").touch()
    with pytest.raises(BadInput, match="exists already"):
        require_new(out)


def test_an_out_that_was_filled_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match="nothing was left behind"), partial_folder(out):
        out.mkdir()
        (out / "letter").write_text("dear")
    assert listing(tmp_path) == ["out", "out/letter"]


def test_no_file_descriptor_stays_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    write(tmp_path / "out")
    with pytest.raises(ValueError, match="x"), partial_folder(tmp_path / "other"):
        raise ValueError("x")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- work that can go on later


def resumed(out: Path, keeps: bool, error: BaseException | None = None) -> list[str]:
    """What is there when the work begins; then it writes "more", and stops if told to."""
    with partial_folder(out, lambda partial: keeps) as partial:
        there = sorted(path.name for path in partial.iterdir())
        (partial / "more").write_text("more")
        if error is not None:
            raise error
    return there


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("x"), ValueError),
        (RunError("x"), RunError),
        (OSError(errno.ENOSPC, "No space left on device"), RunError),
    ],
)
def test_what_can_go_on_stays(tmp_path: Path, error: BaseException, raised: type[BaseException]) -> None:
    out = tmp_path / "out"
    with pytest.raises(raised) as caught:
        resumed(out, keeps=False, error=error)
    assert listing(tmp_path) == [".out.partial", ".out.partial/.cloven-partial", ".out.partial/more"]
    assert raised is not RunError or re.search(r"run the same command again to go on, or remove .*\.out\.partial", str(caught.value))
    assert resumed(out, keeps=True) == [".cloven-partial", "more"]
    assert listing(tmp_path) == ["out", "out/more"]


def test_what_is_not_to_be_kept_is_emptied_first(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path / "out", keeps=False, error=KeyboardInterrupt())
    assert resumed(tmp_path / "out", keeps=False) == [".cloven-partial"]


def test_bad_input_at_the_first_attempt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^x$"):
        resumed(tmp_path / "out", keeps=False, error=BadInput("x"))
    assert listing(tmp_path) == []


def test_bad_input_does_not_destroy_the_work_of_an_earlier_attempt(tmp_path: Path) -> None:
    """A mistyped option beside hours of work."""
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path / "out", keeps=False, error=KeyboardInterrupt())
    before = listing(tmp_path)
    with pytest.raises(BadInput, match=r"^x$"):
        resumed(tmp_path / "out", keeps=True, error=BadInput("x"))
    assert listing(tmp_path) == before
    assert resumed(tmp_path / "out", keeps=True) == [".cloven-partial", "more"]


def test_a_refusal_to_go_on_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path / "out", keeps=False, error=KeyboardInterrupt())
    before = listing(tmp_path)

    def refuses(partial: Path) -> bool:
        raise BadInput("of another model")

    with pytest.raises(BadInput, match="of another model"), partial_folder(tmp_path / "out", refuses):
        raise AssertionError("not reached")
    assert listing(tmp_path) == before


def test_nobody_asks_about_a_folder_that_is_locked(tmp_path: Path) -> None:
    asked = []
    with (
        partial_folder(tmp_path / "out"),
        pytest.raises(BadInput, match="another `cloven prepare`"),
        partial_folder(tmp_path / "out", lambda partial: bool(asked.append(partial))),
    ):
        raise AssertionError("not reached")
    assert asked == []
