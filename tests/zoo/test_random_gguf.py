from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cloven.zoo.random_gguf import _blocks, _shapes, write_random_gguf
from cloven.zoo.shapes import SHAPES, shape_config


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tensors_are_those_of_the_model(shape: str) -> None:
    config = shape_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    expected = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert sorted(size if size[0] > 1 else size[1:] for _, size in _shapes(config)) == expected


def test_a_block_is_a_scale_and_32_codes() -> None:
    data = _blocks(3, 64, np.random.default_rng(0))
    assert data.shape == (3, 2 * 34) and data.dtype == np.uint8
    scales = data.reshape(6, 34)[:, :2].copy().view(np.float16)
    codes = data.reshape(6, 34)[:, 2:].view(np.int8)
    assert np.all(scales == np.float16(0.03 / 127)) and codes.min() >= -127 and len(np.unique(codes)) > 50


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_read(tied: bool, tmp_path: Path) -> None:
    import gguf

    config = LlamaConfig(**{**shape_config("tiny", 2).to_dict(), "tie_word_embeddings": tied})
    reader = gguf.GGUFReader(write_random_gguf(config, tmp_path / "random.gguf"))
    read = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    assert read == {name: size[::-1] if size[0] > 1 else size[1:] for name, size in _shapes(config)}
    assert ("output.weight" in read) != tied
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "norm" in tensor.name:
            assert tensor.tensor_type.name == "F32" and np.all(values == 1)
        else:
            assert tensor.tensor_type.name == "Q8_0" and 0.016 < values.std() < 0.019 and np.abs(values).max() < 0.0301
    assert reader.fields["llama.attention.head_count_kv"].contents() == 4 and reader.fields["llama.block_count"].contents() == 2
