"""The adapted model as PEFT's `merge_and_unload` makes it, W + s·B A in the base's weights: what private LoRA is compared with.

Written here, and compared with PEFT itself in the tests, so that demo and audit need no PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloven.model.adapter import read_adapter
from cloven.model.linears import matrix_of


@torch.no_grad()
def merged_model(base: Path, adapter: Path) -> PreTrainedModel:
    """The base in float32 with the adapter merged into its weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for module in read_adapter(adapter).modules:
        matrix_of(model.get_submodule(module.name)).add_((module.b @ module.a) * module.scale)
    return model
