"""A LoRA adapter in PEFT's format: adapter_config.json and adapter_model.safetensors, without PEFT.

    y = W x + s·B A x        A [r, K], B [N, r], s = alpha / r, or alpha / √r with rslora

The saved tensors name the adapted modules; whatever in the files is not understood is an error, because the result would be another model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloven.errors import BadInput

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 2**20
_MOST_REPETITIONS = 4  # in a pattern
_KEY = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<part>[AB])\.weight")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base
_INERT = {  # fields that say nothing about what the saved factors do
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
_REFUSED = {
    "use_dora": "DoRA rescales the rows of the base's own weights",
    "modules_to_save": "modules_to_save replaces whole modules of the base",
    "layer_replication": "layer_replication changes the base",
    "target_parameters": "target_parameters adapts parameters that are not linear layers",
    "trainable_token_indices": "trainable tokens change the embedding",
    "lora_bias": "lora_bias adds biases",
    "use_qalora": "QALoRA pools the input",
    "alora_invocation_tokens": "activated LoRA depends on the tokens",
    "arrow_config": "Arrow routes between adapters",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "kasa_config": "KaSA changes the base",
    "monteclora_config": "MonteCLoRA samples its weights",
}


@dataclass(frozen=True)
class LoraModule:
    """The adapter of one linear layer: y += scale·B A x.  a: float32 [r, K], b: float32 [N, r]."""

    name: str
    a: Tensor
    b: Tensor
    scale: float

    def __repr__(self) -> str:
        return f"LoraModule({self.name}, r={self.a.shape[0]})"


@dataclass(frozen=True)
class Adapter:
    """An adapter; `sha256` names its weights: names, shapes, bytes and scales."""

    modules: tuple[LoraModule, ...]
    sha256: str


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT directory.

    Raises:
        BadInput: not a LoRA adapter in that format, or one with parts that cannot be served; names them.
    """
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS)
    names = sorted({match["module"] for key in tensors if (match := _KEY.fullmatch(key))})
    odd = sorted(key for key in tensors if not _KEY.fullmatch(key))
    if odd:
        raise BadInput(f"{folder / WEIGHTS}: holds {odd[0]}, which is not the lora_A or lora_B of a linear layer: it cannot be served")
    if not names:
        raise BadInput(f"{folder / WEIGHTS}: holds no adapter weights")
    modules, digest = [], hashlib.sha256(b"cloven/adapter/1")
    for name in names:
        a, b = (tensors.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            raise BadInput(f"{folder / WEIGHTS}: {name} has only one of lora_A and lora_B")
        rank = _of_pattern(config.get("rank_pattern"), name, config.get("r"), "rank")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank:
            raise BadInput(f"{folder}: {name} has factors {list(a.shape)} and {list(b.shape)}; {CONFIG} says rank {rank}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise BadInput(f"{folder / WEIGHTS}: {name} holds NaN or infinity")
        alpha = _of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"), "alpha")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules.append(LoraModule(name, a.float(), b.float(), scale))
        digest.update(json.dumps([name, list(a.shape), list(b.shape), scale]).encode())
        for factor in (a, b):
            data: Any = factor.float().contiguous().numpy()
            digest.update(memoryview(data).cast("B"))
    return Adapter(tuple(modules), digest.hexdigest())


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MAX_CONFIG_BYTES else None
    except FileNotFoundError as error:
        raise BadInput(f"{path.parent}: no {CONFIG}: not a PEFT adapter directory") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise BadInput(f"{path}: peft_type is not LORA; only LoRA adapters can be served")
    for name, why in _REFUSED.items():
        if config.get(name):
            raise BadInput(f"{path}: {name} is set: {why}, so the adapter cannot be served")
    odd = sorted(name for name, value in config.items() if value and name not in _INERT)
    if odd:
        raise BadInput(f"{path}: {odd[0]} is set, and this cloven does not know what it does to the adapter, so it cannot be served")
    if config.get("bias", "none") != "none":
        raise BadInput(f"{path}: bias is {config['bias']!r}: the adapter changes biases of the base, so it cannot be served")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise BadInput(f"{path}: init_lora_weights {start!r} may change the base's weights: merge the adapter into one for the plain base")
    return config


def _of_pattern(pattern: object, module: str, default: object, what: str) -> int:
    """The entry of a rank_pattern or alpha_pattern for a module, as PEFT finds it, or the default."""
    value = default
    if isinstance(pattern, Mapping):
        for key, special in pattern.items():
            if re.search(r"\)[*+{]", key) or len(re.findall(r"[*+{]", key)) > _MOST_REPETITIONS:  # they may take for ever to match
                raise BadInput(f"{CONFIG}: {what}_pattern holds {key!r}: repeated groups, or more than {_MOST_REPETITIONS} repetitions")
            try:
                if len(key) <= 512 and re.fullmatch(rf"(.*\.)?({key})", module):
                    value = special
                    break
            except re.error as error:
                raise BadInput(f"{CONFIG}: {what}_pattern holds {key!r}, which is no pattern") from error
    if type(value) not in (int, float) or not isinstance(value, int | float) or not 0 < value < 2**20:
        raise BadInput(f"{CONFIG}: the {what} of {module} is {value!r}")
    return value  # type: ignore[return-value]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BadInput(f"{path.parent}: no {WEIGHTS}: save the adapter with safe_serialization (the default)")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a safetensors file: {error}") from error
    if not all(tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) for tensor in tensors.values()):
        raise BadInput(f"{path}: holds tensors that are not float32, float16 or bfloat16")
    return tensors
