"""Groups of linears that share an input, found by tracing one forward pass, not by architecture.

Linears that receive the same tensor (q, k and v; gate and up) share one mask and one exchange. The trace runs under FakeTensorMode, so
it needs no memory; its result is stored in the bundle's configuration and never derived again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from cloven.errors import UnsupportedModel
from cloven.model.linears import linears_of, require_supported

Group = tuple[str, ...]
_TRACED_TOKENS = 7


def trace_groups(config: PretrainedConfig) -> list[Group]:
    """Names of the linears that share an input, in the order of execution.

    Raises:
        UnsupportedModel: no causal language model, weights outside linear layers, or linears that the forward pass does not use
            exactly once.
    """
    config = copy.deepcopy(config)
    config._experts_implementation = "batched_mm"
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError as error:
            raise UnsupportedModel(f"{config.model_type}: is not a causal language model that transformers knows") from error
        require_supported(model, config.model_type)
        return _trace(model, config.model_type)


def _trace(model: nn.Module, kind: str) -> list[Group]:
    linears = linears_of(model)
    inputs: list[Tensor] = []  # keeps them alive: an id is unique only that long
    calls: list[tuple[int, str]] = []

    def record(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            inputs.append(x)
            calls.append((id(x), name))

        return hook

    for name, module in linears.items():
        module.register_forward_pre_hook(record(name), with_kwargs=True)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.ones(1, _TRACED_TOKENS, dtype=torch.long), use_cache=False)

    groups: dict[int, list[str]] = {}
    for key, name in calls:
        groups.setdefault(key, []).append(name)
    used = [name for _, name in calls]
    odd = sorted(name for name in linears if used.count(name) != 1)
    if odd:
        raise UnsupportedModel(f"{kind}: {odd[0]} runs {used.count(odd[0])} times in a forward pass; each linear must run once")
    return [tuple(names) for names in groups.values()]
