"""From a half of a bundle to a model that can be served."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cloven.errors import BadInput
from cloven.model.attach import attach
from cloven.model.runtime import RuntimeOptions
from cloven.serving.half import Half
from cloven.serving.model import ServedModel, one_pass_at_a_time
from cloven.serving.peer import peer_is_there

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_LARGEST_TEMPLATE = 2**20
_PEERS = ("CLOVEN_WORKER", "CLOVEN_ENCLAVE", "CLOVEN_SERVER", "CLOVEN_KEYS", "CLOVEN_EXPOSED")


@dataclass(frozen=True)
class LoadOptions:
    """How the model is loaded.

    Args:
        name: what clients call it; None: the name of the bundle's folder.
        chat_template: a file with a template, for a model that has none.
        dtype: "auto", "float32" or "bfloat16".
        base, pin: private LoRA's base model, and the fingerprint of OUT/client.
    """

    name: str | None = None
    chat_template: Path | None = None
    dtype: str = "auto"
    base: str | None = None
    pin: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise BadInput(f"dtype {self.dtype!r}: choose auto, float32 or bfloat16")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise BadInput("model_name: letters, digits, and . _ / - between them")


def load(half: Half, how: LoadOptions, runtime: RuntimeOptions) -> ServedModel:
    """Load the half's model and tokenizer, and open a session.

    Args:
        runtime: how the peer is reached, now and whenever it was gone and is back.

    Raises:
        BadInput: the chat template, or the tokenizer's kind.  ClovenError: the bundle, or the peer.
    """
    template = _template(how.chat_template)
    for name in _PEERS:
        os.environ.pop(name, None)  # attached below, with all settings
    os.environ.update({name: value for name, value in (("CLOVEN_BASE", how.base), ("CLOVEN_PIN", how.pin)) if value})  # read while loading
    model = AutoModelForCausalLM.from_pretrained(half.folder, dtype=how.dtype, trust_remote_code=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(half.folder, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BadInput(f"{half.folder}: serving needs a fast tokenizer (tokenizer.json)")
    if template is not None:
        tokenizer.chat_template = template
    _settle(model, tokenizer)
    one_pass_at_a_time(model)
    passed = ("timeout", "insecure_plain_tcp", "pin", "placement", "pads", "on_empty", "constant_rows")
    options = {name: getattr(runtime, name) for name in passed}
    name = how.name or _default_name(half.folder)
    return ServedModel(
        model,
        tokenizer,
        name,
        lambda: attach(model, runtime.address, runtime.keys, exposed=runtime.exposed, **options),
        lambda: peer_is_there(half, runtime),
        half.batches,
    )


def _settle(model: Any, tokenizer: Any) -> None:
    """Settings that transformers would otherwise warn of with every request."""
    config = model.generation_config
    if config.pad_token_id is None:
        ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        if path.stat().st_size > _LARGEST_TEMPLATE:
            raise BadInput(f"{path}: too large for a chat template")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as a chat template") from error


def _default_name(folder: Path) -> str:
    name = folder.resolve().parent.name
    return name if _NAME.fullmatch(name) else "cloven"
