"""All attacks on a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.findings import Findings
from cloven.audit.kv_shield.equal_pairs import equal_pairs
from cloven.audit.kv_shield.gram import gram
from cloven.audit.kv_shield.known_plaintext import known_plaintext
from cloven.audit.kv_shield.norms import norms
from cloven.audit.kv_shield.snapshots import snapshots
from cloven.audit.kv_shield.sorting import sorting
from cloven.audit.kv_shield.subject import Subject, open_subject
from cloven.audit.kv_shield.table import table
from cloven.audit.kv_shield.weights import weights
from cloven.audit.plain_model import plain_model
from cloven.errors import BadInput
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.manifest import TRUSTED, KvManifest
from cloven.kv_shield.prepare import attention_shapes
from cloven.zoo.text import sample_text

TEXT_TOKENS = 256
TEXT_SEED = 3
ATTACKS: tuple[Callable[[Subject], list[Attack]], ...] = (
    table,
    sorting,
    norms,
    gram,
    known_plaintext,
    equal_pairs,
    snapshots,
    weights,
)
NOT_TESTED = (
    "A live session: whoever holds its connection and its name has the enclave undo the cache. It needs no attack on the keys.",
    "The accelerator while it runs: in every mode it sees hidden states, q, k and v.",
    "Layers behind the first, where rows depend on the whole text before them; and the cache's k.",
    "Guessing with a language model: every token is looked up by itself, and not by what is likely to stand beside it.",
    "More than two sessions, and sessions whose texts are alike only in part.",
    "Sealed blocks that are changed, swapped or rolled back, and what is left in freed memory and message buffers.",
    "The enclave itself: rows are keyed for the audit as it keys them. Side channels of the machines: timing, memory access, power.",
)


@torch.no_grad()
def attack_cache(model: Any, tokens: Tensor, config: KvShieldConfig | None = None, seed: int = 0) -> list[Attack]:
    """Run every attack in every mode.

    Args:
        model: the public model.
        tokens: a text, int64 [T], T ≥ 2·(d + ρ) + 16: what the thief wants.
        config: ρ.
        seed: of the keys that are drawn for it.
    """
    subject = open_subject(model, tokens, (config or KvShieldConfig()).noise_dims, seed)
    return [outcome for attack in ATTACKS for outcome in attack(subject)]


def audit_kv_shield(out: Path, tokens: Tensor | None = None, seed: int = 0) -> Findings:
    """Attack caches of a bundle's model, in every mode, with the bundle's ρ.

    Args:
        out: OUT of `cloven prepare kv-shield`: both halves.
        tokens: a text, int64 [T]: what the thief wants; sampled from the model if None.

    Raises:
        BadBundle, TamperedBundle, ForeignBundle: the halves.  BadInput: the text is too short.
    """
    model, config = plain_model(out)
    shape = attention_shapes(model)[0]
    text = sample_text(model, 1, TEXT_TOKENS, TEXT_SEED)[0] if tokens is None else tokens
    needed = 2 * (shape.head_dim + config.noise_dims) + 16
    if len(text) < needed:
        raise BadInput(f"the text has {len(text)} tokens: give at least {needed}")
    parameters = {
        "bundle": KvManifest.read(out / "trusted", TRUSTED).bundle,
        **config.to_dict(),
        "head_dim": shape.head_dim,
        "kv_heads": shape.kv_heads,
        "text_tokens": len(text),
        "text": f"sampled from the model, seed {TEXT_SEED}" if tokens is None else "given",
        "cloven": version("cloven"),
        "torch": torch.__version__,
        "seed": seed,
        "keys": "of the audit's own caches, from the seed; what is sealed has fresh nonces",
    }
    return Findings("kv-shield", attack_cache(model, text, config, seed), parameters=parameters, not_tested=NOT_TESTED)
