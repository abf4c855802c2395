"""The command line in this process, and what its errors look like."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def one_line(outcome: Outcome | subprocess.CompletedProcess[str], code: int, match: str) -> None:
    """An error as the command line promises it: the exit code, one line that says what is wrong, no traceback, nothing on stdout."""
    got, out, err = (
        (outcome.code, outcome.out, outcome.err) if isinstance(outcome, Outcome) else (outcome.returncode, outcome.stdout, outcome.stderr)
    )
    assert got == code, err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("cloven: ") and re.search(match, lines[0]), err
    assert out == "" and "Traceback" not in err
