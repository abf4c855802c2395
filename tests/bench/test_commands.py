from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from cloven.bench.commands import answer_commands


class Counting:
    def __init__(self) -> None:
        self.total = 0

    def add(self, number: int) -> dict[str, int]:
        self.total += number
        return {"total": self.total}

    def secret(self) -> dict[str, int]:
        raise AssertionError("not an operation")


def test_commands_are_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"op": "add", "number": 2}\n{"op": "add", "number": 3}\n'))
    answers = io.StringIO()
    answer_commands(Counting(), ("add",), answers, before=7)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [{"ready": True, "before": 7}, {"total": 2}, {"total": 5}]


def test_only_operations_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"op": "secret"}\n'))
    with pytest.raises(ValueError, match="not in tuple"):
        answer_commands(Counting(), ("add",), io.StringIO())


def test_what_libraries_print_does_not_get_between_the_answers() -> None:
    code = """
import ctypes
from cloven.bench.commands import claim_output
print("before", flush=True)
answers = claim_output()
print("from Python", flush=True)
ctypes.CDLL(None).puts(b"from C")
ctypes.CDLL(None).fflush(None)
print("answer", file=answers)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "before\nanswer\n"
    assert result.stderr == "from Python\nfrom C\n"
