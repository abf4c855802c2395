"""A `cloven.bench.runner` process, asked one thing at a time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from cloven.errors import RunError


class RunnerProcess:
    """A `cloven.bench.runner` process."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-P", "-m", "cloven.bench.runner", *arguments]
        environment = dict(os.environ)
        if arguments[0] == "split":
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `cloven generate` does
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.before = int(self._answer()["before"])

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

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
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
