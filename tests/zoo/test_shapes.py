from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cloven.errors import BadInput
from cloven.zoo.shapes import SHAPES, linear_parameters, shape_config


@pytest.mark.parametrize(("shape", "parameters"), [("tiny", 4.09e6), ("llama-3.2-1b", 1.236e9), ("llama-2-7b", 6.738e9)])
def test_shapes_are_those_of_the_models(shape: str, parameters: float) -> None:
    config = shape_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) == pytest.approx(parameters, rel=0.02)
    per_layer, head = linear_parameters(config)
    linears = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert sum(count for name, count in linears.items() if name != "lm_head") == per_layer * config.num_hidden_layers
    assert linears["lm_head"] == head


def test_fewer_layers() -> None:
    assert shape_config("llama-2-7b", 3).num_hidden_layers == 3
    assert SHAPES["llama-2-7b"]["num_hidden_layers"] == 32  # the table is not changed


@pytest.mark.parametrize("layers", [0, -1, 33])
def test_numbers_of_layers_that_it_does_not_have(layers: int) -> None:
    with pytest.raises(BadInput, match="llama-2-7b has 32"):
        shape_config("llama-2-7b", layers)


def test_unknown_shapes() -> None:
    with pytest.raises(BadInput, match=r"choose one of tiny, llama-3\.2-1b, llama-2-7b"):
        shape_config("gpt-5")
