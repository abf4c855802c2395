"""Finding the attention layers of a model, and checking by numbers that they are what KV-Shield takes them for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cloven.errors import UnsupportedModel

if TYPE_CHECKING:  # transformers is being imported when this module is
    from transformers import PretrainedConfig, PreTrainedModel

SEPARATE, FUSED = ("q_proj", "k_proj", "v_proj"), ("qkv_proj", "c_attn")
OUTPUTS = ("o_proj", "c_proj")


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention modules by name, in the order of the layers.

    Raises:
        UnsupportedModel: none with projections that are known.
    """
    found = {}
    for name, module in model.named_modules():
        if projections_of(module) and output_of(module):
            found[name] = module
    if not found:
        raise UnsupportedModel(f"{model.config.model_type}: has no attention layer with projections that cloven knows")
    return found


def projections_of(attention: nn.Module) -> tuple[str, ...]:
    """Names of the modules that make q, k and v: three, or one where they are fused; none if this is no attention module."""
    if all(_is_linear(getattr(attention, name, None)) for name in SEPARATE):
        return SEPARATE
    return next(((name,) for name in FUSED if _is_linear(getattr(attention, name, None))), ())


def output_of(attention: nn.Module) -> str:
    """Name of the module that takes the attention output, or ""."""
    return next((name for name in OUTPUTS if _is_linear(getattr(attention, name, None))), "")


def _is_linear(module: object) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def head_counts(attention: Any, config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, kv heads, and dimensions per head."""
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(attention.head_dim)


def rotary_module(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes cos and sin, None where the model has none.

    Raises:
        UnsupportedModel: several, or one whose frequencies change with the length.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if not found:
        return None
    kind = getattr(found[0], "rope_type", "default")
    if len(found) > 1 or not isinstance(getattr(found[0], "inv_freq", None), Tensor) or kind in ("dynamic", "longrope"):
        raise UnsupportedModel(f"{model.config.model_type}: its rotary embedding ({kind}) is not one table of fixed frequencies")
    rotary: nn.Module = found[0]
    return rotary


def rotation_function(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The family's own `apply_rotary_pos_emb(q, k, cos, sin)`.

    Raises:
        UnsupportedModel: it has none.
    """
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        raise UnsupportedModel(f"{type(attention).__name__}: rotates in a way of its own")
    return function  # type: ignore[no-any-return]


@torch.no_grad()
def rotation_matrices(attention: nn.Module, rotary: nn.Module, positions: Tensor, head_dim: int) -> Tensor:
    """What the family's rotation does at positions [S]: float32 matrices R [S, d, d] with rope(x) = x R, from its own code."""
    x = torch.eye(head_dim).view(1, head_dim, 1, head_dim).expand(1, head_dim, len(positions), head_dim)
    cos, sin = rotary(x, positions[None])
    return rotation_function(attention)(x, x, cos, sin)[0][0].transpose(0, 1)
