from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cloven.model.checkpoint import Checkpoint
from cloven.zoo.random_checkpoint import write_random_checkpoint
from cloven.zoo.shapes import shape_config


def test_it_loads_and_is_the_same_every_time(tmp_path: Path) -> None:
    config = shape_config("tiny", 2)
    folder = write_random_checkpoint(config, tmp_path / "a", shard_bytes=2**20)
    again = write_random_checkpoint(config, tmp_path / "b", shard_bytes=2**20)
    names = Checkpoint(folder).names
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert all(torch.equal(Checkpoint(folder).tensor(name), Checkpoint(again).tensor(name)) for name in names)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(input_ids=torch.arange(1, 9).view(1, -1)).logits).all()


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, tie_word_embeddings=True
    )
    names = Checkpoint(write_random_checkpoint(config, tmp_path / "a")).names
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
