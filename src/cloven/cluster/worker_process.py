"""A real `cloven worker` in a process of its own, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from cloven.errors import RunError

_STOP_SECONDS = 10.0


class WorkerProcess:
    """`cloven worker EXPOSED --listen ADDRESS …` as a subprocess; a context manager.

    Args:
        exposed: OUT/exposed.
        address: where it listens; None: an ipc address in a folder of its own.
        arguments: more arguments for the command line.
    """

    def __init__(self, exposed: Path, address: str | None = None, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cloven-")  # mode 0700
        self.address = address or f"ipc://{self._folder.name}/worker"
        self._log = (Path(self._folder.name) / "worker.log").open("w+")
        # -P: the current folder is not searched for modules
        command = [sys.executable, "-P", "-m", "cloven", "worker", str(exposed), "--listen", self.address, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._log, stdin=subprocess.DEVNULL)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self.process.pid

    def require_running(self) -> None:
        """Raise with the worker's own last words if it has ended.

        Raises:
            RunError: it has ended.
        """
        if self.process.poll() is not None:
            raise RunError(f"the worker process ended with exit code {self.process.returncode}: {self.log().strip()[-500:]}")

    def log(self) -> str:
        """What the worker has written to its standard error so far."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace") if not self._log.closed else ""

    def kill(self) -> None:
        """SIGKILL, for fault tests."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL if it does not end; removes the folder."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_SECONDS)
        if self.process.poll() is None:
            self.kill()
        self._log.close()
        self._folder.cleanup()
