"""A GGUF file of a given shape with random Q8_0 weights, for llama.cpp: for benchmarks, where values do not matter.

Q8_0: of every 32 weights of a row, one float16 scale and 32 int8 codes. Norms are float32, as llama.cpp's own converter writes them.
Needs the package gguf.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import LlamaConfig

_BLOCK = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])  # GGML's block_q8_0
_SIZE = 0.03 / 127  # the weights are uniform in ±0.03, as those of the unsplit model
_WRITTEN_AT_A_TIME = 2**22  # blocks


def write_random_gguf(config: LlamaConfig, path: Path) -> Path:
    """Write one; `path`. The largest tensor is held in memory.

    Raises:
        ImportError: gguf is not installed.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    shapes = dict(_shapes(config))
    for name, (rows, columns) in shapes.items():
        if rows == 1:
            writer.add_tensor_info(name, [columns], np.dtype(np.float32), 4 * columns)
        else:
            per_row = columns // 32 * _BLOCK.itemsize
            writer.add_tensor_info(name, [rows, per_row], np.dtype(np.uint8), rows * per_row, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)  # no secrets in here
    for rows, columns in shapes.values():
        writer.write_tensor_data(np.ones(columns, dtype=np.float32) if rows == 1 else _blocks(rows, columns, random))
    writer.close()
    return path


def _blocks(rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """Random blocks of a matrix [rows, columns], as bytes [rows, …]."""
    blocks = np.empty(rows * columns // 32, dtype=_BLOCK)
    blocks["scale"] = _SIZE
    for start in range(0, len(blocks), _WRITTEN_AT_A_TIME):
        part = blocks["codes"][start : start + _WRITTEN_AT_A_TIME]
        part[...] = random.integers(-127, 128, part.shape, dtype=np.int8)
    return blocks.view(np.uint8).reshape(rows, -1)


def _shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """The tensors, by llama.cpp's names: rows and columns; one row: a norm."""
    d, f = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "token_embd.weight", (config.vocab_size, d)
    for layer in range(config.num_hidden_layers):
        sizes = {"attn_norm": (1, d), "attn_q": (heads, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, heads)}
        sizes |= {"ffn_norm": (1, d), "ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f)}
        for name, size in sizes.items():
            yield f"blk.{layer}.{name}.weight", size
    yield "output_norm.weight", (1, d)
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, d)
