"""The first import of a program may be any of these: registration and transformers' quantizers import each other's way.

Each is tried in a process of its own, forked from one that has imported neither of them, but what both are slow to import.
"""

from __future__ import annotations

import pytest

from tests.split_models import run_python

FIRST = (
    "from cloven import ClovenConfig",
    "import cloven; from transformers.quantizers import auto",
    "from cloven.slip.scheme import Slip",
    "from cloven.model.registration import ClovenConfig",
    "from cloven import adapt",
)
SCRIPT = """
import os, sys
import huggingface_hub, numpy, safetensors.torch, tokenizers, torch, zmq
assert not {"cloven", "transformers"} & set(sys.modules)
for first in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(first)
            from cloven.model import registration
            print(sorted(registration._schemes), flush=True)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("first", [FIRST[:3], pytest.param(FIRST, marks=pytest.mark.long)], ids=["some", "all"])
def test_all_schemes_are_known_whatever_comes_first(first: tuple[str, ...]) -> None:
    done = run_python(SCRIPT, *first, timeout=240)
    assert done.stdout.splitlines() == ["['kv-shield', 'private-lora', 'slip']"] * len(first), done.stdout + done.stderr
