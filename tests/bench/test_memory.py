from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cloven.bench.memory import MemoryFigures, bench_memory, memory_figures, unsplit_bytes
from cloven.bench.runner import CONTEXT
from cloven.errors import BadInput
from cloven.slip.config import SlipConfig
from cloven.zoo.shapes import SHAPES, linear_parameters, shape_config

READ: dict[str, Any] = {"anonymous": 900, "mapped": 400, "parameters": 450, "cache": 30, "layers": 200, "embeddings": 150, "factors": 180}


def figures(layers: int = 2) -> MemoryFigures:
    return memory_figures("tiny", shape_config("tiny", layers), SlipConfig(), 8, mapped=77, interpreter=800, read=READ)


def test_private_memory_is_taken_apart_without_rest() -> None:
    result = figures()
    assert result.private_bytes == 1300  # mapped weights count
    assert result.rest_bytes == 1300 - 800 - 30 - 450
    assert result.interpreter_bytes + result.kv_cache_bytes + result.model_bytes + result.rest_bytes == result.private_bytes
    assert result.private_share == (450 + 20) / result.unsplit_bytes
    assert (result.pads_mapped_bytes, result.tokens, result.secret_fraction) == (77, CONTEXT + 8, 0.03)


def test_all_layers_by_parameters_and_the_rest_as_if_it_grew() -> None:
    result = figures(2)
    assert result.layers_of_shape == 5
    assert result.model_bytes_all_layers == 200 * 5 / 2 + 250
    assert result.unsplit_bytes_all_layers == unsplit_bytes(shape_config("tiny"))
    assert result.private_share_all_layers == (750 + 20 * 5 / 2) / result.unsplit_bytes_all_layers


def test_nothing_is_extrapolated_when_all_layers_are_there() -> None:
    result = figures(5)
    assert result.private_share_all_layers == result.private_share and result.model_bytes_all_layers == result.model_bytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [1, None])
def test_bytes_of_the_unsplit_model(shape: str, layers: int | None) -> None:
    config = shape_config(shape, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    assert sum(parameter.nbytes for parameter in model.parameters()) == unsplit_bytes(config)


def test_bad_input() -> None:
    for shape, precision in (("gpt-5", "int8"), ("tiny", "int4")):
        with pytest.raises(BadInput):
            bench_memory(shape, lambda *_: None, precision=precision)


def check_real(result: MemoryFigures) -> None:
    assert 0 < result.rest_bytes < 2**27 and result.interpreter_bytes > 2**26 and result.pads_mapped_bytes > 0
    per_layer, head = linear_parameters(shape_config("tiny"))
    assert result.factor_bytes == pytest.approx(4 * 0.03 * (result.layers * per_layer + head), rel=0.1)
    per_token = 2 * result.layers * 4 * 32 * 2
    assert result.kv_cache_bytes == result.tokens * per_token and result.tokens == CONTEXT + 2
    assert result.to_dict()["layers"] == result.layers


def test_a_real_trusted_process() -> None:
    check_real(bench_memory("tiny", lambda *_: None, layers=1, tokens=2))


@pytest.mark.long
def test_extrapolated_and_measured() -> None:
    """What is extrapolated from one layer is exact in the model, and at least what is measured with all five."""
    few, more = (bench_memory("tiny", lambda *_: None, layers=layers, tokens=2) for layers in (1, None))
    check_real(few)
    check_real(more)
    assert few.model_bytes_all_layers == more.model_bytes and few.unsplit_bytes_all_layers == more.unsplit_bytes
    assert few.private_share_all_layers > more.private_share == more.private_share_all_layers  # the rest does not grow fivefold
