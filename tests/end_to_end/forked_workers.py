"""Real `cloven worker` processes by the dozen: forked from one that has imported everything, so that each is there in a tenth of a second.

As a script: reads lines of JSON, the arguments of a `cloven worker`, forks a process that runs it, answers its process id.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cloven.errors import BadInput
from cloven.worker.transcript import read_transcript
from tests.helpers import free_port


class ForkedWorker:
    """One worker: SIGKILL, SIGSTOP, a new start at the same address; its transcript over all starts."""

    def __init__(self, farm: Farm, exposed: Path, address: str, *arguments: str) -> None:
        self.address = address
        self._farm, self._arguments, self._starts = farm, [str(exposed), "--listen", address, *arguments], 0
        self.pid = 0
        self.start()

    def start(self) -> None:
        """And wait until it listens."""
        assert not self.alive
        self._starts += 1
        self.pid = self._farm.fork([*self._arguments, "--record", str(self._record(self._starts))])
        deadline = time.monotonic() + 30
        while not self._listens():
            assert self.alive and time.monotonic() < deadline, self._farm.log()
            time.sleep(0.005)

    def _record(self, start: int) -> Path:
        return self._farm.folder / f"{abs(hash(self.address))}-{start}.record"

    def _listens(self) -> bool:
        kind, _, place = self.address.partition("://")
        host, _, port = place.rpartition(":")
        with socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET) as probe:
            return probe.connect_ex(place if kind == "ipc" else (host, int(port))) == 0

    @property
    def alive(self) -> bool:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 0)
                return True
        return False

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; gone when this returns."""
        if self.alive:
            self.send(signal.SIGKILL)
            while self.alive:
                time.sleep(0.001)

    def received(self) -> list[tuple[int, Tensor]]:
        """(group, c [K]) of every row that it was sent, over all starts."""
        rows: list[tuple[int, Tensor]] = []
        for start in range(1, self._starts + 1):
            with contextlib.suppress(BadInput):  # a record that was being written when it was killed
                for group, c in read_transcript(self._record(start)):
                    rows += [(group, row) for row in c]
        return rows


class Farm:
    """The parent's side: a context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cl")
        self.folder = Path(self._folder.name)
        self._numbers = itertools.count()
        self._workers: list[ForkedWorker] = []
        self._log = (self.folder / "log").open("w")
        command = [sys.executable, "-W", "ignore", "-m", "tests.end_to_end.forked_workers"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=Path(__file__).parents[2]
        )

    def fork(self, arguments: list[str]) -> int:
        """A process id."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def address(self, transport: str = "ipc") -> str:
        """A new one."""
        return f"tcp://127.0.0.1:{free_port()}" if transport == "tcp" else f"ipc://{self.folder}/{next(self._numbers)}"

    @contextlib.contextmanager
    def workers(self, exposed: Path, *parts: str, keys: Path | None = None) -> Iterator[list[ForkedWorker]]:
        """One worker for each part ("" for everything); they end with the context."""
        more = ["--keys", str(keys)] if keys else []
        started: list[ForkedWorker] = []
        try:
            for part in parts:
                address = self.address("tcp" if keys else "ipc")
                started.append(ForkedWorker(self, exposed, address, *(["--part", part] if part else []), *more))
            yield started
        finally:
            for worker in started:
                worker.kill()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def __enter__(self) -> Farm:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()


def distinct(rows: list[tuple[int, Tensor]]) -> set[tuple[int, bytes]]:
    """Rows as a set."""
    return {(group, row.numpy().tobytes()) for group, row in rows}


def main() -> None:
    """The child's side, and its children's."""
    import cloven.cli.worker
    import cloven.worker.service
    from cloven.cli.main import run

    del cloven
    assert torch.get_num_threads()  # imported; nothing has run that would start its threads
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1):
            os.dup2(null, standard)
        sys.argv = ["cloven", "worker", *json.loads(line)]
        run()
        os._exit(0)


if __name__ == "__main__":
    main()
