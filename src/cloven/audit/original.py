"""The model that a split one is compared with: loaded only if it can be the one that was split."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from cloven.errors import BadInput
from cloven.model.linears import is_linear, matrix_of
from cloven.model.source import Source
from cloven.slip.layer import SplitLinear

_ADVICE = "give the model that the bundle was made of"


def vocabulary_of(config: PretrainedConfig) -> int:
    """How many tokens the model knows."""
    return int(config.get_text_config().vocab_size)


def same_kind(source: Source, config: PretrainedConfig, tokenizer: Any) -> Source:
    """The source itself, after what can be compared before the weights are read.

    Args:
        config, tokenizer: the split model's.

    Raises:
        BadInput: another architecture or vocabulary.
    """
    if source.config.model_type != config.model_type:
        raise BadInput(f"original {source.name}: is a {source.config.model_type}, the bundle a {config.model_type}; {_ADVICE}")
    sizes = vocabulary_of(source.config), vocabulary_of(config)
    if sizes[0] != sizes[1]:
        raise BadInput(f"original {source.name}: has a vocabulary of {sizes[0]}, the bundle of {sizes[1]}; {_ADVICE}")
    if any(path.name.startswith(("tokenizer.", "vocab.")) for path in source.files()):
        other = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
        if other.get_vocab() != tokenizer.get_vocab():
            raise BadInput(f"original {source.name}: its tokenizer has another vocabulary than the bundle's; {_ADVICE}")
    return source


def load_like(source: Source, split: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The unsplit model in a dtype; every tensor has the shape that the split model says.

    Raises:
        BadInput: a shape differs.
    """
    plain = source.load()
    found = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters(remove_duplicate=False)}
    found |= {f"{name}.weight": tuple(matrix_of(module).shape) for name, module in plain.named_modules() if is_linear(module)}
    for name, module in split.named_modules():
        expected = {f"{name}.{own}": tuple(parameter.shape) for own, parameter in module.named_parameters(recurse=False)}
        if isinstance(module, SplitLinear):
            expected = {f"{name}.weight": (module.out_features, module.in_features)}
        for parameter, shape in expected.items():
            if found.get(parameter) != shape:
                raise BadInput(f"original {source.name}: its {parameter} has another shape than the bundle's, or is missing; {_ADVICE}")
    converted: PreTrainedModel = plain.to(dtype)
    return converted.eval()
