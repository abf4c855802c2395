"""A SLIP bundle of a given shape with random codes and factors: for benchmarks, where values do not matter and an SVD takes hours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from cloven.bundle.bundle import Bundle, open_bundle
from cloven.bundle.manifest import ExposedGroup, ExposedManifest
from cloven.bundle.shards import ShardWriter
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.bundle.verification import sha256_file, sha256_matrix
from cloven.field.codec import row_bounds
from cloven.model.groups import trace_groups
from cloven.slip.config import SCRAMBLES, SlipConfig
from cloven.slip.split_model import LinearShape, SplitModelShape


def write_random_bundle(config: LlamaConfig, out: Path, parameters: SlipConfig) -> Bundle:
    """Write OUT/trusted and OUT/exposed with random contents; the same files, formats and sizes as `prepare_slip` would write."""
    generator = torch.Generator().manual_seed(0)  # no secrets in here
    trusted, exposed = out / "trusted", out / "exposed"
    trusted.mkdir(parents=True, mode=0o700)
    exposed.mkdir()
    secret_shards, exposed_shards = ShardWriter(trusted, "model", secret=True), ShardWriter(exposed, "exposed", secret=False)
    records, bounds, described = [], [], []
    for index, names in enumerate(trace_groups(config)):
        shapes = [_linear_shape(name, config, parameters.secret_fraction) for name in names]
        columns = shapes[0].columns
        rows = sum(shape.rows for shape in shapes)
        codes = torch.randint(-127, 128, (parameters.terms * rows, columns), dtype=torch.int8, generator=generator)
        tensor = f"group-{index:05d}"
        exposed_shards.add(tensor, codes)
        records.append(ExposedGroup(codes.shape[0], columns, exposed_shards.file_of[tensor], tensor, sha256_matrix(codes)))
        bounds.append(row_bounds(codes))
        gather = torch.randperm(parameters.terms * rows, generator=generator).view(parameters.terms, rows).to(torch.int32)
        start = 0
        for shape in shapes:
            for name, tensor_value in _trusted_tensors(shape, gather[:, start : start + shape.rows], generator).items():
                secret_shards.add(f"{shape.name}.{name}", tensor_value)
            start += shape.rows
        rounds = SCRAMBLES[parameters.scramble]
        for side, stages, size in (("column", 1 + rounds, columns), ("mixing", rounds, rows)):
            orders = [torch.randperm(size, generator=generator).to(torch.int32) for _ in range(stages)]
            secret_shards.add(f"{shapes[0].name}.{side}_gather", torch.stack(orders) if orders else torch.empty(0, size, dtype=torch.int32))
            secret_shards.add(f"{shapes[0].name}.{side}_scale", torch.ones(stages, size))
        described.append(tuple(shapes))
    exposed_shards.close()
    d = config.hidden_size
    secret_shards.add("model.embed_tokens.weight", torch.randn(config.vocab_size, d, generator=generator).to(torch.bfloat16))
    norms = [f"model.layers.{i}.{kind}_layernorm.weight" for i in range(config.num_hidden_layers) for kind in ("input", "post_attention")]
    for name in (*norms, "model.norm.weight"):
        secret_shards.add(name, torch.ones(d, dtype=torch.bfloat16))
    secret_shards.close()
    secret_shards.write_index()
    manifest = ExposedManifest(tuple(records), exposed_shards.files)
    manifest.write(exposed)
    record = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "cloven",
            "scheme": "slip",
            "version": 1,
            "bundle": manifest.bundle,
            "model": SplitModelShape(parameters.precision, parameters.scramble, tuple(described)).to_dict(),
        },
    }
    (trusted / "config.json").write_text(json.dumps(record), encoding="utf-8")
    files = {path.name: sha256_file(path) for path in trusted.iterdir()}
    TrustedManifest("slip", manifest, tuple(bounds), files, parameters.to_dict()).write(trusted)
    return open_bundle(out)


def _linear_shape(name: str, config: LlamaConfig, fraction: float) -> LinearShape:
    d, f, head = config.hidden_size, config.intermediate_size, config.head_dim
    rows, columns = {
        "q_proj": (config.num_attention_heads * head, d),
        "k_proj": (config.num_key_value_heads * head, d),
        "v_proj": (config.num_key_value_heads * head, d),
        "o_proj": (d, config.num_attention_heads * head),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
        "lm_head": (config.vocab_size, d),
    }[name.rpartition(".")[2]]
    return LinearShape(name, rows, columns, round(fraction * rows * columns / (rows + columns)), bias=False)


def _trusted_tensors(shape: LinearShape, row_gather: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    size = 0.3 / (73 * shape.columns**0.5)  # the rms of random codes is 73: outputs of ordinary size
    return {
        "weight": torch.empty(0),
        "secret_a": 0.01 * torch.randn(shape.rank, shape.columns, generator=generator),
        "secret_b": 0.01 * torch.randn(shape.rows, shape.rank, generator=generator),
        "row_gather": row_gather,
        "row_scale": torch.full(row_gather.shape, size),
    }
