"""Which attacks there are for which scheme, and how a bundle is audited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from cloven.audit.findings import Findings
from cloven.audit.kv_shield.audit import audit_kv_shield
from cloven.audit.private_lora.audit import audit_private_lora
from cloven.audit.slip.audit import audit_slip
from cloven.audit.slip.subject import TEXT_TOKENS as WINDOW
from cloven.audit.slip.training import Budget
from cloven.bundle.manifest import manifest_format
from cloven.bundle.trusted_manifest import FORMAT as SLIP_TRUSTED
from cloven.errors import BadBundle, BadInput
from cloven.kv_shield.manifest import TRUSTED
from cloven.private_lora.manifest import SERVER

BUDGET = Budget(seconds=180)


def audit(
    out: Path,
    tokens: Tensor | None = None,
    *,
    seed: int = 0,
    budget: Budget = BUDGET,
    relative: PreTrainedModel | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Findings:
    """Attack a bundle.

    Args:
        out: OUT of `cloven prepare`, both halves.
        tokens: a text, int64 [T]: what a cache's thief wants, or what perplexities are measured on; sampled from the model if not given.
        seed: of the attackers' choices, and of keys that the audit draws; no secret of the bundle depends on it.
        budget: of the attacks on a SLIP bundle that train.
        relative: a public relative of a SLIP bundle's model.
        progress: called with (stage, done, total).

    Raises:
        BadBundle: no bundle that can be audited.  BadInput: the text is too short, or not for this scheme.
    """
    found = manifest_format(out / "trusted")
    if relative is not None and found != SLIP_TRUSTED:
        raise BadInput("a public relative is for the audit of a SLIP bundle")
    if manifest_format(out / "server") == SERVER:
        if tokens is not None:
            raise BadInput("a private-LoRA bundle is audited without a text: its attacks are on weights and queries")
        return audit_private_lora(out, seed)
    if found == SLIP_TRUSTED:
        text = None
        if tokens is not None:
            text = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW) if len(tokens) >= WINDOW else tokens[None]
        return audit_slip(out, text, seed=seed, budget=budget, relative=relative, progress=progress)
    if found != TRUSTED:
        raise BadBundle(f"{out}: there is no bundle here with both halves; give OUT of `cloven prepare`")
    return audit_kv_shield(out, tokens, seed)
