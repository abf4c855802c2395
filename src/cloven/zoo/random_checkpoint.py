"""A checkpoint of a given shape with random weights: for measuring preparation, where the time does not depend on the values."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from cloven.bundle.shards import ShardWriter

_SPREAD = 0.03


def write_random_checkpoint(config: LlamaConfig, folder: Path, shard_bytes: int = 2**30) -> Path:
    """Write a model directory with bf16 weights, tensor by tensor: memory is that of a shard.

    Args:
        folder: a new folder.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    generator = torch.Generator().manual_seed(0)  # no secrets in here
    shards = ShardWriter(folder, "model", secret=False, shard_bytes=shard_bytes)
    for name, tensor in state.items():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            shards.add(name, _values(tensor, generator))
    shards.close()
    shards.write_index()
    record = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def _values(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.dim() < 2:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    return torch.empty(tensor.shape, dtype=torch.bfloat16).uniform_(-_SPREAD, _SPREAD, generator=generator)
