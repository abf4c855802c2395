"""The first import of a program may be any of these: registration and transformers' quantizers import each other's way."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "first",
    [
        "from cloven import ClovenConfig",
        "import cloven; from transformers.quantizers import auto",
        "from cloven.model.registration import ClovenConfig",
        "from cloven.slip.scheme import Slip",
        "from cloven import adapt",
    ],
)
def test_all_schemes_are_known_whatever_comes_first(first: str) -> None:
    check = "from cloven.model import registration; print(sorted(registration._schemes))"
    command = [sys.executable, "-c", f"{first}\n{check}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['kv-shield', 'private-lora', 'slip']", done.stderr
