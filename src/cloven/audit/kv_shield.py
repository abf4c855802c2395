"""Attacks on a KV cache that was stolen: what layer 0 gives away, in every mode.

The thief has the public model and a snapshot of layer 0's rows of v for a text of T tokens. There v is a function of the token alone:

    v_t = W_v norm(E_t),       a table of one row per token of the vocabulary and kv head.

    table         the nearest row of the table
    sorting       the nearest row after sorting both: invariant under any permutation (as in arXiv 2505.18332)
    norms         the nearest row by the norms of the heads: invariant under any rotation
    gram          the other tokens of a block of 16 are known: which token has these inner products with them?
    known_plaintext   n tokens are known: solve v = v' N by least squares, then look the others up
    equal_pairs   which places hold the same token? The projector on the columns of V' does not depend on the key: the distance of
                  places i and j under it is small when their rows differ by noise only
    snapshots     the same from two sessions with the same text: what both column spaces share is free of noise
    weights       which row of the public W_v stands where in the device's weights?

Source of the attacks: kv-maths of the project; those on permutations are published, the others ours.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.keys import permutations, session_keys
from cloven.kv_shield.messages import Label
from cloven.kv_shield.prepare import attention_shapes
from cloven.kv_shield.shapes import AttentionShape
from cloven.kv_shield.vault import Vault
from cloven.model.linears import matrix_of

BLOCK = 16
MODES = ("none", "permute", "session", "sealed")  # sealed: permute, while idle
_THIEF = "has the public model and a snapshot of the cache"
_DEVICE = "has the public model and the device's weights"


@dataclass(frozen=True)
class Layer0:
    """What layer 0 makes of every token: `table` float32 [vocabulary, G, d], and the shape of its attention."""

    table: Tensor
    shape: AttentionShape
    weight: Tensor  # W_v [G·d, hidden]


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


def snapshot(mode: str, plain: Tensor, noise: int) -> Tensor:
    """The cache's rows [T, G, D] for plain rows [T, G, d], under fresh keys drawn as the enclave draws them."""
    if mode == "none":
        return plain
    stream = SecretStream(secrets.token_bytes(KEY_BYTES), "audit")
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


def _nearest(rows: Tensor, table: Tensor) -> Tensor:
    """For each row [T, W] the number of the nearest row of the table [N, W], by L1."""
    return torch.cat([torch.cdist(part, table, p=1).argmin(1) for part in rows.split(64)])


def by_table(rows: Tensor, table: Tensor) -> Tensor:
    """Guessed tokens [T] from rows [T, G, D], by the nearest row of the table."""
    return _nearest(rows[..., : table.shape[2]].flatten(1), table.flatten(1))


def by_sorting(rows: Tensor, table: Tensor) -> Tensor:
    """Guessed tokens by the sorted values of every head; wider rows are thinned out to the table's width."""
    ordered = rows.sort(-1).values
    if rows.shape[2] != table.shape[2]:
        ordered = torch.nn.functional.interpolate(ordered, table.shape[2], mode="linear", align_corners=True)
    return _nearest(ordered.flatten(1), table.sort(-1).values.flatten(1))


def by_norms(rows: Tensor, table: Tensor) -> Tensor:
    """Guessed tokens by the norms of the heads."""
    return _nearest(rows.norm(dim=-1), table.norm(dim=-1))


def by_gram(rows: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    """Guesses for the last token of each block of 16 whose other tokens are known, [blocks]: by inner products."""
    guesses = []
    for block, known in zip(rows.split(BLOCK), tokens.split(BLOCK), strict=True):
        if len(block) < BLOCK:
            break
        seen = torch.einsum("tgd,gd->tg", block, block[-1])  # with the 15 others, and with itself
        candidates = torch.einsum("tgd,ngd->ntg", table[known[:-1]], table)
        itself = table.pow(2).sum(-1)[:, None]
        guesses.append((torch.cat([candidates, itself], 1) - seen).abs().flatten(1).sum(1).argmin())
    return torch.stack(guesses)


def by_known_plaintext(rows: Tensor, table: Tensor, tokens: Tensor, known: int) -> Tensor:
    """Guesses for the tokens after the first `known` ones, which are known."""
    plain = table[tokens[:known]]
    recovered = []
    for head in range(rows.shape[1]):
        n = torch.linalg.lstsq(rows[:known, head].double(), plain[:, head].double(), driver="gelsd").solution  # v' N = v
        recovered.append((rows[known:, head].double() @ n).float())
    return by_table(torch.stack(recovered, 1), table)


def equal_pairs(spaces: list[Tensor], tokens: Tensor) -> float:
    """Share of the pairs of equal tokens among as many closest pairs, by orthonormal bases [T, r] of column spaces."""
    distance = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for basis in spaces:
        p = basis @ basis.t()
        distance += p.diagonal()[:, None] + p.diagonal()[None] - 2 * p
    i, j = torch.triu_indices(len(tokens), len(tokens), 1)
    same = tokens[i] == tokens[j]
    count = int(same.sum())
    return float(same[distance[i, j].argsort()[:count]].double().mean()) if count else 0.0


def column_spaces(rows: Tensor) -> list[Tensor]:
    """An orthonormal basis of the columns of every head's rows [T, G, D]."""
    return [torch.linalg.qr(rows[:, head].double())[0] for head in range(rows.shape[1])]


def shared_spaces(first: list[Tensor], second: list[Tensor], dimensions: int) -> list[Tensor]:
    """What two column spaces have in common: the `dimensions` directions with the smallest angles, for every head."""
    shared = []
    for a, b in zip(first, second, strict=True):
        u, _, _ = torch.linalg.svd(a.t() @ b)
        shared.append(a @ u[:, :dimensions])
    return shared


def match_rows(exposed: Tensor, public: Tensor, heads: int) -> Tensor:
    """For every row of the device's W_v the nearest row of the public one, within its head; [rows]."""
    size = len(public) // heads
    return torch.cat(
        [_nearest(a, b) + size * head for head, (a, b) in enumerate(zip(exposed.split(size), public.split(size), strict=True))]
    )


def audit_kv_shield(model: Any, tokens: Tensor, config: KvShieldConfig | None = None) -> list[Attack]:
    """Run every attack in every mode.

    Args:
        model: the public model.
        tokens: a text, int64 [T], T ≥ 2·(d + ρ) + 16: what the thief wants.
        config: ρ.
    """
    layer, noise = layer0_of(model), (config or KvShieldConfig()).noise_dims
    plain = layer.table[tokens]
    snapshots = {mode: snapshot(mode, plain, noise) for mode in MODES}
    second = snapshot("session", plain, noise)
    d = layer.shape.head_dim
    full = d + noise
    chance = float((tokens == tokens.mode().values).double().mean())  # always guess the commonest token
    results: list[Attack] = []

    def add(name: str, metric: str, values: dict[str, float], guess: float, tries: int, adversary: str = _THIEF) -> None:
        for mode, value in values.items():
            verdict = verdict_of(value, guess, tries)
            results.append(Attack(name, f"kv-shield/{mode}", adversary, metric, value, guess, values["none"], tries, verdict))

    def hits(guesses: Tensor, truth: Tensor) -> float:
        return float((guesses == truth).double().mean())

    simple: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"table": by_table, "sorting": by_sorting, "norms": by_norms}
    for name, attack in simple.items():
        found = {mode: hits(attack(rows, layer.table), tokens) for mode, rows in snapshots.items()}
        add(name, "fraction of tokens recovered", found, chance, len(tokens))
    last = torch.stack([block[-1] for block in tokens.split(BLOCK) if len(block) == BLOCK])
    found = {mode: hits(by_gram(rows, layer.table, tokens), last) for mode, rows in snapshots.items()}
    add("gram", "fraction of last tokens of a block of 16 recovered, the others known", found, chance, len(last))
    for known, name in ((full // 4, "known_plaintext_quarter"), (full // 2, "known_plaintext_half"), (full + 8, "known_plaintext")):
        found = {mode: hits(by_known_plaintext(rows, layer.table, tokens, known), tokens[known:]) for mode, rows in snapshots.items()}
        add(name, f"fraction of tokens recovered once {known} are known (d + ρ = {full})", found, chance, len(tokens) - known)
    pairs_chance = _share_of_equal_pairs(tokens)
    pairs = max(1, round(pairs_chance * len(tokens) * (len(tokens) - 1) / 2))  # of equal tokens: what the value is a fraction of
    found = {mode: equal_pairs(column_spaces(rows), tokens) for mode, rows in snapshots.items()}
    add("equal_pairs", "fraction of pairs of equal tokens found", found, pairs_chance, pairs)
    both = {mode: [column_spaces(rows), column_spaces(rows)] for mode, rows in snapshots.items()}
    both["session"][1] = column_spaces(second)
    found = {mode: equal_pairs(shared_spaces(a, b, d), tokens) for mode, (a, b) in both.items()}
    add("snapshots", "fraction of pairs of equal tokens found from two sessions with one text", found, pairs_chance, pairs)
    rows = len(layer.weight)
    order = (
        permutations(SecretStream(secrets.token_bytes(KEY_BYTES), "audit"), layer.shape.kv_heads, d)
        + d * torch.arange(layer.shape.kv_heads)[:, None]
    ).flatten()
    share = hits(match_rows(layer.weight[order], layer.weight, layer.shape.kv_heads), order)
    places, unkeyed = torch.arange(rows), match_rows(layer.weight, layer.weight, layer.shape.kv_heads)  # the weights of none and session
    found = {"none": hits(unkeyed, places), "permute": share, "session": 1 - hits(unkeyed, places), "sealed": share}
    add(
        "weights",
        "fraction of the rows whose place is found in the device's weights (session: that are out of place, hence keyed)",
        found,
        1 / d,
        rows,
        _DEVICE,
    )
    return results


def _share_of_equal_pairs(tokens: Tensor) -> float:
    i, j = torch.triu_indices(len(tokens), len(tokens), 1)
    return float((tokens[i] == tokens[j]).double().mean())
