"""Tiny random models of every supported family, for tests and self-checks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

_VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def _without(*names: str, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in _SIZES.items() if name not in names} | more


def _configs() -> dict[str, PretrainedConfig]:
    return {
        "llama": LlamaConfig(**_SIZES),
        "llama-tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
        "qwen2": Qwen2Config(**_without("head_dim")),
        "qwen3": Qwen3Config(**_SIZES),
        "mistral": MistralConfig(**_SIZES, sliding_window=8),
        "gemma": GemmaConfig(**_SIZES),
        "phi3": Phi3Config(**_without("head_dim")),
        "gpt2": GPT2Config(
            vocab_size=_VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0, pad_token_id=0
        ),
        "llama-mha": LlamaConfig(**_without("num_key_value_heads")),
        "glm": GlmConfig(**_SIZES, partial_rotary_factor=0.5),
        "gpt-neox": GPTNeoXConfig(**_without("head_dim", "num_key_value_heads"), rotary_pct=0.5),
        "gemma2": Gemma2Config(**_SIZES, sliding_window=8),
        "gemma3": Gemma3TextConfig(**_SIZES, sliding_window=8),
        "granite": GraniteConfig(**_without("head_dim")),
        "olmo2": Olmo2Config(**_without("head_dim")),
        "starcoder2": Starcoder2Config(**_without("head_dim")),
        "falcon": FalconConfig(
            vocab_size=_VOCABULARY,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=True,
            parallel_attn=True,
            bias=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
    }


FAMILIES = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "glm",
    "granite",
    "olmo2",
    "starcoder2",
    "falcon",
    "gpt2",
    "gpt-neox",
)


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a tiny model: one of FAMILIES, or "mixtral" (a mixture of experts, which is refused)."""
    if family == "mixtral":
        return MixtralConfig(**_SIZES, num_local_experts=4)
    return _configs()[family]


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a family; the scale of its weights is raised so that its logits are not all alike."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
