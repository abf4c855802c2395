"""What the exposed half is worth to the worker (A1): the model with zero in the place of the secret part.

The attacker gets embeddings, norms, biases and row scales for free. With the scramble the worker's rows and columns are in an order it
does not know; `exposed_model` builds both what it has, and what it would have if it also knew the scramble and the column scales.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cloven.bundle.bundle import Bundle
from cloven.bundle.exposed_copy import ExposedCopy
from cloven.slip.exposed_matrix import ExposedMatrix
from cloven.slip.split_model import SplitModelShape


@torch.no_grad()
def exposed_model(original: Path, bundle: Bundle, *, knows_scramble: bool) -> PreTrainedModel:
    """The original architecture with the exposed weights, float32.

    Args:
        original: the original model's directory: gives the attacker embeddings, norms and biases.
        bundle: its SLIP split.
        knows_scramble: undo the scramble and the column scales, as only the trusted side can.
    """
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    trusted = _tensors(bundle.trusted)
    record = json.loads((bundle.trusted / "config.json").read_text(encoding="utf-8"))
    shape = SplitModelShape.from_dict(record["quantization_config"]["model"])
    copy = ExposedCopy(bundle.exposed, bundle.manifest)
    for index, group in enumerate(shape.groups):
        leader = group[0].name
        exposed = ExposedMatrix(
            copy.verified(index),
            trusted[f"{leader}.column_gather"],
            trusted[f"{leader}.column_scale"],
            torch.cat([trusted[f"{linear.name}.row_gather"] for linear in group], dim=1),
            torch.cat([trusted[f"{linear.name}.row_scale"] for linear in group], dim=1),
        )
        matrix = (
            exposed.dequantised() if knows_scramble else exposed.codes[: exposed.row_scale.shape[1]] * exposed.row_scale[0].abs()[:, None]
        )
        start = 0
        for linear in group:
            _put(model.get_submodule(linear.name), matrix[start : start + linear.rows].float())
            start += linear.rows
    return model


def _put(module: nn.Module, matrix: Tensor) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight.data = matrix.t().contiguous() if isinstance(module, Conv1D) else matrix.contiguous()


def _tensors(trusted: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(trusted.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118 (no mapping)
    return tensors
