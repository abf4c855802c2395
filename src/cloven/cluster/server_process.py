"""A `cloven` server in a process of its own, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from cloven.errors import RunError
from cloven.wire.address import parse_address

_STOP_SECONDS = 10.0
_START_SECONDS = 60.0


def _open(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), timeout=1).close()
        return True
    return False


class ServerProcess:
    """`cloven COMMAND FOLDER --listen ADDRESS …` as a subprocess; a context manager.

    Args:
        command: the command's name.
        folder: the half of a bundle that it serves.
        address: where it listens; None: an ipc address in a folder of its own.
        arguments: more arguments for the command line; metrics are waited for at the loopback.
    """

    def __init__(self, command: str, folder: Path, address: str | None, *arguments: str) -> None:
        self._name = command
        self._metrics_port = int(arguments[arguments.index("--metrics-port") + 1]) if "--metrics-port" in arguments else None
        self._folder = tempfile.TemporaryDirectory(prefix="cloven-")  # mode 0700
        self.address = address or f"ipc://{self._folder.name}/{command}"
        self._log = (Path(self._folder.name) / f"{command}.log").open("w+")
        # -P: the current folder is not searched for modules
        line = [sys.executable, "-P", "-m", "cloven", command, str(folder), "--listen", self.address, *arguments]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=self._log, stdin=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        """Wait until the server listens, and its metrics can be read where they are asked for.

        Raises:
            RunError: it ended instead, and why.
        """
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not self._listens() and time.monotonic() < deadline:
                self.require_running()
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise
        return self

    def _listens(self) -> bool:
        parsed = parse_address(self.address)
        if parsed.path is not None:
            return parsed.path.exists() and self._publishes()
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        return _open(host.strip("[]"), int(port)) and self._publishes()

    def _publishes(self) -> bool:
        return self._metrics_port is None or _open("127.0.0.1", self._metrics_port)

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def require_running(self) -> None:
        """Raise with the process's own last words if it has ended.

        Raises:
            RunError: it has ended.
        """
        if self.process.poll() is not None:
            raise RunError(f"the {self._name} process ended with exit code {self.process.returncode}: {self.log().strip()[-500:]}")

    def log(self) -> str:
        """What the process has written to its standard error so far."""
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
