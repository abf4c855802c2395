from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from cloven.bench.memory import unsplit_bytes
from cloven.bench.runner import CONTEXT, Runner, random_model
from cloven.zoo.shapes import shape_config


@pytest.fixture(scope="module")
def plain() -> Runner:
    return Runner(random_model("tiny", "2"), None)


def test_the_time_in_the_layers_is_part_of_the_time(plain: Runner) -> None:
    answer = plain.decode(3)
    assert len(answer["seconds"]) == len(answer["seconds_layers"]) == 3
    assert all(0 < layers < whole for layers, whole in zip(answer["seconds_layers"], answer["seconds"], strict=True))


def test_the_time_in_the_layers_has_neither_the_head_nor_the_embedding_in_it(plain: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain.model
    head, embedding, first = model.lm_head.forward, model.model.embed_tokens.forward, model.model.layers[0].mlp.forward

    def slow(forward: object, seconds: float) -> object:
        def call(*args: object) -> object:
            time.sleep(seconds)
            return forward(*args)  # type: ignore[operator]

        return call

    monkeypatch.setattr(model.lm_head, "forward", slow(head, 0.3))
    monkeypatch.setattr(model.model.embed_tokens, "forward", slow(embedding, 0.3))
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", slow(first, 0.5))
    answer = plain.decode(1)
    assert answer["seconds"][0] > 1.1 and answer["seconds"][0] - answer["seconds_layers"][0] > 0.6
    assert answer["seconds_layers"][0] > 0.5


def test_memory_while_decoding(plain: Runner) -> None:
    config = plain.model.config
    read = plain.memory_while_decoding(4)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert read["cache"] == per_token * (CONTEXT + 4)
    assert read["parameters"] == unsplit_bytes(shape_config("tiny", 2)) and read["mapped"] == 0
    table = 2 * config.vocab_size * config.hidden_size
    assert read["embeddings"] == table and read["layers"] == read["parameters"] - 2 * table - 2 * config.hidden_size
    assert read["factors"] == 0 and read["anonymous"] > read["parameters"]


def test_weights_that_are_mapped_from_files_are_told_apart(tmp_path: Path) -> None:
    model = random_model("tiny", "1")
    weight = model.lm_head.weight
    (tmp_path / "weights").write_bytes(bytes(weight.nbytes))
    assert Runner(model, None).memory()["mapped"] == 0
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=weight.numel(), dtype=weight.dtype).view(weight.shape)
    model.lm_head.weight = torch.nn.Parameter(mapped)
    memory = Runner(model, None).memory()
    assert memory["mapped"] == weight.nbytes and memory["parameters"] == unsplit_bytes(shape_config("tiny", 1))
