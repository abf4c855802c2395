"""Shapes of well-known models, for benchmarks with random weights."""

from __future__ import annotations

from transformers import LlamaConfig

from cloven.errors import BadInput

SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 672,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    },
}


def shape_config(shape: str, layers: int | None = None) -> LlamaConfig:
    """The configuration of a shape, with fewer layers if told so; bfloat16.

    Raises:
        BadInput: no such shape, or more layers than it has.
    """
    if shape not in SHAPES:
        raise BadInput(f"shape {shape!r}: choose one of {', '.join(SHAPES)}")
    sizes = dict(SHAPES[shape])
    most = int(sizes["num_hidden_layers"])
    if layers is not None and not 1 <= layers <= most:
        raise BadInput(f"{layers} layers: {shape} has {most}")
    sizes["num_hidden_layers"] = layers or most
    return LlamaConfig(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="bfloat16")


def linear_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Parameters of the linears of one decoder layer, and of the head."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.head_dim
    attention = d * heads * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    return attention + 3 * d * f, d * config.vocab_size
