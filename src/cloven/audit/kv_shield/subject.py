"""What is attacked: layer 0's rows of v in the cache of a text, in every mode, beside what the public model makes of every token.

In layer 0, v is a function of the token alone:

    v_t = W_v norm(E_t),       a table of one row per token of the vocabulary and kv head.

The rows are keyed here as the enclave keys them, under keys that follow from the audit's seed.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.kv_shield.keys import permutations, session_keys
from cloven.kv_shield.messages import Label
from cloven.kv_shield.prepare import attention_shapes
from cloven.kv_shield.shapes import AttentionShape
from cloven.kv_shield.vault import Vault
from cloven.model.linears import matrix_of

MODES = ("none", "permute", "session", "sealed")  # sealed: permute, while idle


@dataclass(frozen=True)
class Layer0:
    """What layer 0 makes of every token: `table` float32 [vocabulary, G, d], and the shape of its attention."""

    table: Tensor
    shape: AttentionShape
    weight: Tensor  # W_v [G·d, hidden]


@dataclass(frozen=True, repr=False)
class Subject:
    """A text whose cache was stolen.

    Args:
        layer: what the thief computes from the public model.
        tokens: the text, int64 [T]: what the thief wants.
        noise: ρ.
        caches: the rows of v by mode, [T, G, D].
        second: the rows of another session with the same text.
        seed: of the keys.
    """

    layer: Layer0
    tokens: Tensor
    noise: int
    caches: Mapping[str, Tensor]
    second: Tensor
    seed: int = 0

    @property
    def chance(self) -> float:
        """What it gives to guess the commonest token always."""
        return float((self.tokens == self.tokens.mode().values).double().mean())


@torch.no_grad()
def open_subject(model: Any, tokens: Tensor, noise: int, seed: int = 0) -> Subject:
    """Key the text's rows in every mode.

    Args:
        model: the public model.
        tokens: a text, int64 [T], T ≥ 2·(d + ρ) + 16.
        noise: ρ.
        seed: keys that an audit draws follow from it: no bundle uses them.
    """
    layer = layer0_of(model)
    plain = layer.table[tokens]
    caches = {mode: snapshot(mode, plain, noise, keys_of(seed, mode)) for mode in MODES}
    return Subject(layer, tokens, noise, caches, snapshot("session", plain, noise, keys_of(seed, "second session")), seed)


@torch.no_grad()
def layer0_of(model: Any) -> Layer0:
    """Run layer 0's v on every token of the vocabulary, each alone: one position sees only itself.

    Where positions are added to the embeddings (GPT-2), v depends on the place too: the figures are then those of a thief who knows it.
    """
    shape = attention_shapes(model)[0]
    attention = model.get_submodule(shape.name)
    module = attention.get_submodule(shape.projections[-1])
    caught: list[Tensor] = []
    hook = module.register_forward_hook(lambda _m, _a, output: caught.append(output))
    try:
        for ids in torch.arange(model.config.vocab_size).split(4096):
            model(input_ids=ids[:, None], use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    width = shape.widths()[2]
    rows = torch.cat(caught)[:, 0, -width:].float()
    return Layer0(rows.view(len(rows), shape.kv_heads, shape.head_dim), shape, matrix_of(module)[-width:].float())


def keys_of(seed: int, what: str) -> SecretStream:
    """Keys for caches that an audit makes, the same for the same seed."""
    return SecretStream(hashlib.sha256(f"{seed} {what}".encode()).digest(), "audit")


def snapshot(mode: str, plain: Tensor, noise: int, stream: SecretStream | None = None) -> Tensor:
    """The cache's rows [T, G, D] for plain rows [T, G, d], under fresh keys drawn as the enclave draws them."""
    if mode == "none":
        return plain
    stream = stream or SecretStream(secrets.token_bytes(KEY_BYTES), "audit")
    t, heads, d = plain.shape
    if mode in ("permute", "sealed"):
        permuted = torch.gather(plain, 2, permutations(stream, heads, d).expand(t, heads, d))
        return permuted if mode == "permute" else _sealed(permuted)
    level = plain.pow(2).mean(-1, keepdim=True).sqrt()
    random = stream.normal(t * heads, noise).float().view(t, heads, noise) * level
    return torch.einsum("tgd,gde->tge", torch.cat([plain, random], -1), session_keys(stream, heads, d + noise).v)


def _sealed(rows: Tensor) -> Tensor:
    """What the enclave makes of the rows, read as numbers between −1 and 1."""
    buffer: Any = rows.contiguous().numpy()
    label = Label(0, "values", 0, tuple(rows.shape), "float32")
    data = Vault(bytes(16), secrets.token_bytes(16)).seal(label, memoryview(buffer).cast("B"))[: rows.nbytes]
    return torch.frombuffer(bytearray(data), dtype=torch.int32).view(rows.shape) / 2.0**31
