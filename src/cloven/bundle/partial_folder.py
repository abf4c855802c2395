"""A folder that appears complete or not at all: written beside its place as `.OUT.partial`, renamed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cloven.errors import BadInput, RunError

_MARKER = ".cloven-partial"  # tells our own half-written folder from somebody else's


def require_new(out: Path) -> None:
    """Refuse an OUT that holds something.

    Raises:
        BadInput: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: exists already; choose another OUT, or remove it first")


@contextlib.contextmanager
def partial_folder(out: Path, resumes: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A folder that becomes OUT if all goes well and vanishes otherwise; what an earlier run left behind is removed.

    Args:
        resumes: for work that can go on later: whether what an earlier run left in the folder is to be kept (or it raises `BadInput`). The
            folder then stays; only if it was new and the input was bad it vanishes.
    """
    partial = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            partial.mkdir(mode=0o700)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise BadInput(f"{out}: cannot be written beside {partial}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(f"{out}: another `cloven prepare` is writing there") from error
        ours = (partial / _MARKER).is_file() or not any(partial.iterdir())
        if os.fstat(lock).st_uid != os.getuid() or not ours:
            raise BadInput(f"{partial}: is in the way, and no earlier `cloven prepare` of yours left it there; remove it first")
        os.fchmod(lock, 0o700)
        (partial / _MARKER).touch(mode=0o600)
        keep = resumes is not None and resumes(partial)
        try:
            if not keep:
                _empty(partial)
            yield partial
            (partial / _MARKER).unlink()
            partial.chmod(0o755)
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except BaseException as error:
            stays = keep or (resumes is not None and not isinstance(error, BadInput))
            if not stays:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError | RunError):
                reason = (error.strerror if isinstance(error, OSError) else None) or error
                rest = f"run the same command again to go on, or remove {partial}" if stays else "nothing was left behind"
                raise RunError(f"{out}: {reason}; {rest}") from error
            raise
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == _MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
