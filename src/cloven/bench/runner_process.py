"""A benchmark's process (`cloven.bench.commands`), asked one thing at a time."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from cloven.errors import RunError

_PATIENCE = 30  # seconds
PASSIVE = ("split", "stored")  # kinds of model that share their cores with a worker


class RunnerProcess:
    """One process with something to measure; a context manager.

    Args:
        arguments: of the module; for `cloven.bench.runner` the kind of model first.
        module: what runs there.

    `ready` is what it said when it had loaded.
    """

    def __init__(self, *arguments: str, module: str = "cloven.bench.runner") -> None:
        command = [sys.executable, "-P", "-m", module, *arguments]
        environment = dict(os.environ)
        if arguments[0] in PASSIVE:
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `cloven generate` does
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            self.ready = self._answer()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> RunnerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, op: str, **arguments: float) -> dict[str, Any]:
        """Run a command there; its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    @property
    def before(self) -> int:
        """Bytes of private memory before it loaded anything: the interpreter's and its libraries'."""
        return int(self.ready["before"])

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it was loading, and nobody waits for it any more
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"a benchmark process ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def median_of(results: list[dict[str, Any]], key: str = "seconds") -> float:
    """The median over all values of all answers."""
    return statistics.median(float(value) for result in results for value in result[key])
