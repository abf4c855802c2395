"""Stock transformers load no bundle of any scheme: they would warn, and run on random weights, or on a base without its adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.kv_bundles import kv_bundle
from tests.lora_bundles import lora_bundle
from tests.split_models import run_python, tiny_bundle, tiny_folder

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM

def load(folder):
    try:
        AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.ones(1, 3, dtype=torch.long))
        print("it ran")
    except Exception as error:
        print(type(error).__name__, "mismatch" in str(error))

for folder in sys.argv[1:]:
    load(folder)
print("cloven" in sys.modules)
import cloven
load(sys.argv[1])
load(sys.argv[2])
"""


def test_no_bundle_loads_without_importing_cloven_and_then_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process for all of them, and importing cloven later still helps. Of KV-Shield, neither as it is, nor with the quantisation method
    removed from its configuration: the weights are flat."""
    monkeypatch.setenv("CLOVEN_BASE", str(tiny_folder("llama")))
    folders = []
    for family, mode in (("llama", "permute"), ("llama", "session"), ("gpt2", "session")):
        stripped = tmp_path / f"{family}-{mode}"
        shutil.copytree(kv_bundle(family, mode) / "exposed", stripped)
        record = json.loads((stripped / "config.json").read_text())
        del record["quantization_config"]
        (stripped / "config.json").write_text(json.dumps(record))
        folders += [str(kv_bundle(family, mode) / "exposed"), str(stripped)]
    result = run_python(SCRIPT, str(tiny_bundle("llama").trusted), str(lora_bundle() / "client"), *folders)
    said = result.stdout.splitlines()
    assert len(said) == 2 + len(folders) + 1 + 2 and "it ran" not in said, result.stdout + result.stderr
    assert said[:2] == ["RuntimeError True"] * 2, said  # of the tripwires
    assert said[-3:] == ["False", "NotAttached False", "NotAttached False"], said
