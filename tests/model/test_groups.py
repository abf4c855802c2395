from __future__ import annotations

import resource

import pytest
from torch import Tensor, nn
from transformers import LlamaConfig, T5Config
from transformers.pytorch_utils import Conv1D

from cloven.errors import UnsupportedModel
from cloven.model.groups import _trace, trace_groups
from cloven.zoo.tiny import FAMILIES, tiny_config
from tests.split_models import tiny

LLAMA_LIKE = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PER_LAYER = {
    "llama": LLAMA_LIKE,
    "llama-tied": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3": LLAMA_LIKE,
    "granite": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "glm": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
    "starcoder2": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("c_fc",), ("c_proj",)),
    "falcon": (("query_key_value", "dense_h_to_4h"), ("dense",), ("dense_4h_to_h",)),  # attention and MLP in parallel
    "phi3": (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
    "gpt2": (("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)),
    "gpt-neox": (("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_every_family(family: str) -> None:
    groups = trace_groups(tiny_config(family))
    ends = [tuple(name.rpartition(".")[2] for name in group) for group in groups]
    assert ends == [*PER_LAYER[family], *PER_LAYER[family], ("lm_head",)]
    assert len({name for group in groups for name in group}) == sum(map(len, groups))


def test_full_names_in_the_order_of_execution() -> None:
    assert trace_groups(tiny_config("llama"))[:2] == [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
        ("model.layers.0.self_attn.o_proj",),
    ]


def test_every_linear_of_the_model_is_in_a_group() -> None:
    for family in FAMILIES:
        linears = {name for name, module in tiny(family).named_modules() if isinstance(module, nn.Linear | Conv1D)}
        assert {name for group in trace_groups(tiny_config(family)) for name in group} == linears


def test_the_configuration_is_not_changed() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    trace_groups(config)
    assert config.to_dict() == before


def test_a_trace_of_70_billion_parameters_takes_no_memory() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128_256
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config.num_hidden_layers = 4  # one layer is like the other; each is 1.7 GB in bf16
    assert len(trace_groups(config)) == 17
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"mixtral: model\.layers\.0\.mlp\.experts is a mixture of experts"):
        trace_groups(tiny_config("mixtral"))


def test_an_encoder_and_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="t5: is not a causal language model"):
        trace_groups(T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32, vocab_size=64))


class Odd(nn.Module):
    """A model of which one linear runs twice, or not at all."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.embed, self.first, self.second, self.times = nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), times

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        del use_cache
        x: Tensor = self.first(self.embed(input_ids))
        for _ in range(self.times):
            x = self.second(x)
        return x


@pytest.mark.parametrize("times", [0, 2])
def test_a_linear_must_run_once(times: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"odd: second runs {times} times"):
        _trace(Odd(times), "odd")
    assert _trace(Odd(1), "odd") == [("first",), ("second",)]
