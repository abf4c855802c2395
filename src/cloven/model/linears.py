"""The linear layers of a causal language model, whatever class they have, and what cannot be protected."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cloven.errors import UnsupportedModel

_MOE = (
    "is a mixture of experts: its experts are 3-D parameters, not linear layers, and hiding the routing would need every expert "
    "for every token; mixture-of-experts models are not supported"
)


_FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"  # an nn.Linear that adds its bias by itself; not imported for it


def is_linear(module: nn.Module) -> bool:
    """nn.Linear itself, GPT-2's Conv1D or Falcon's own; other subclasses may compute something else."""
    kind = type(module)
    return kind in (nn.Linear, Conv1D) or f"{kind.__module__}.{kind.__qualname__}" == _FALCON


def matrix_of(module: nn.Module) -> Tensor:
    """The weight as W [N, K] with y = W x + b (Conv1D stores Wᵀ)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if type(module) is Conv1D else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias [N], if there is one."""
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers by name."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def require_supported(model: nn.Module, kind: str) -> None:
    """Refuse a model with weight matrices outside linear and embedding layers: they would stay where the worker is not.

    Args:
        kind: the model's type, for the error.

    Raises:
        UnsupportedModel: names the layer.
    """
    for name, module in model.named_modules():
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            raise UnsupportedModel(f"{kind}: {name} {_MOE}")
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or is_linear(module) or isinstance(module, nn.Embedding):
                continue
            raise UnsupportedModel(
                f"{kind}: layer {name} ({type(module).__name__}.{parameter_name}) cannot be split; "
                "supported are models whose weights are in Linear, Conv1D and Embedding layers"
            )
    if not linears_of(model):
        raise UnsupportedModel(f"{kind}: has no linear layers")
