"""Which attacks there are for which scheme, and how a bundle is audited."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield import audit_kv_shield
from cloven.audit.plain_model import plain_model
from cloven.audit.private_lora import audit_private_lora
from cloven.bundle.manifest import manifest_format
from cloven.errors import BadBundle, BadInput
from cloven.kv_shield.manifest import TRUSTED
from cloven.kv_shield.prepare import attention_shapes
from cloven.private_lora.manifest import SERVER
from cloven.zoo.text import sample_text

TEXT_TOKENS = 256
TEXT_SEED = 3


def audit(out: Path, tokens: Tensor | None = None) -> list[Attack]:
    """Attack a bundle.

    Args:
        out: OUT of `cloven prepare kv-shield` or `private-lora`, both halves.
        tokens: the text that the attacker wants, int64 [T]; sampled from the model if not given.

    Raises:
        BadBundle: no bundle that can be audited.  BadInput: the text is too short.
    """
    if manifest_format(out / "server") == SERVER:
        if tokens is not None:
            raise BadInput("a private-LoRA bundle is audited without a text: its attacks are on weights and queries")
        return audit_private_lora(out)
    if manifest_format(out / "trusted") != TRUSTED:
        found = manifest_format(out / "trusted")
        what = "SLIP bundles cannot be audited yet" if found else "there is no bundle here with both halves; give OUT of `cloven prepare`"
        raise BadBundle(f"{out}: {what}")
    model, config = plain_model(out)
    if tokens is None:
        tokens = sample_text(model, 1, TEXT_TOKENS, TEXT_SEED)[0]
    needed = 2 * (attention_shapes(model)[0].head_dim + config.noise_dims) + 16
    if len(tokens) < needed:
        raise BadInput(f"the text has {len(tokens)} tokens: give at least {needed}")
    with torch.no_grad():
        return audit_kv_shield(model, tokens, config)
