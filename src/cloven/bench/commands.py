"""A benchmark's process on command: JSON lines on standard input, one JSON line back for each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO


def claim_output() -> TextIO:
    """Where answers go: what was standard output. From now on everything else that is printed, by libraries in C as well, is an error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return answers


def answer_commands(runner: object, operations: Sequence[str], answers: TextIO, **ready: Any) -> None:
    """Say that the process is `ready`, then call the operation that each command {"op": NAME, **arguments} names, until input ends."""
    print(json.dumps({"ready": True, **ready}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        operation = getattr(runner, operations[operations.index(command.pop("op"))])
        print(json.dumps(operation(**command)), file=answers, flush=True)
