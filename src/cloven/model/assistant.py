"""The assistant of speculative decoding: a small unprotected model in the trusted process, whose drafts the protected model checks."""

from __future__ import annotations

from transformers import PretrainedConfig

from cloven.errors import BadInput
from cloven.model.source import Source, open_source


def open_assistant(model: str, config: PretrainedConfig) -> Source:
    """Find an assistant for a protected model; its weights are not loaded yet.

    Args:
        model: a model directory, or a model on the Hub.
        config: the protected model's configuration.

    Raises:
        BadInput: there is no such model, it is quantised or split, or its vocabulary has another size.

    transformers can translate between two tokenizers; that is not offered here. Two vocabularies of one size are taken for the same one:
    if they are not, drafts are wrong and are taken back.
    """
    source = open_source(model)
    size, expected = source.config.get_text_config().vocab_size, config.get_text_config().vocab_size
    if size != expected:
        raise BadInput(f"{model}: an assistant needs the model's own tokenizer: its vocabulary has {size} tokens, the model's {expected}")
    return source
