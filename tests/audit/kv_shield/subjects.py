"""Small tables with planted answers, keys of known kinds, and a cache of a random layer 0."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.subject import MODES, Layer0, Subject, snapshot
from tests.kv_bundles import SHAPE

TOKENS, HEADS, D, NOISE = 50, 2, 8, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table() -> Tensor:
    """[N, G, d]."""
    return torch.randn(TOKENS, HEADS, D, generator=generator())


def text(count: int = 64, vocabulary: int = TOKENS) -> Tensor:
    return torch.randint(0, vocabulary, (count,), generator=generator(1))


def permuted(rows: Tensor) -> Tensor:
    return torch.stack([rows[:, head, torch.randperm(D, generator=generator(head))] for head in range(HEADS)], 1)


def rotated(rows: Tensor) -> Tensor:
    q = torch.stack([torch.linalg.qr(torch.randn(D, D, generator=generator(head)))[0] for head in range(HEADS)])
    return torch.einsum("tgd,gde->tge", rows, q)


def mixed(rows: Tensor, noise: int = NOISE, seed: int = 5) -> Tensor:
    """One invertible matrix per head on rows with noise behind them."""
    wide = torch.cat([rows, torch.randn(*rows.shape[:2], noise, generator=generator(seed))], -1)
    return torch.einsum("tgd,gde->tge", wide, torch.randn(HEADS, D + noise, D + noise, generator=generator(seed + 1)))


@functools.cache
def subject(noise: int = 8) -> Subject:
    """A stolen cache of 160 tokens out of 200, G = 2, d = 16; keys are fresh in every run."""
    d, vocabulary = 16, 200
    rows = torch.randn(vocabulary, HEADS, d, generator=generator(2))
    layer = Layer0(rows, replace(SHAPE, kv_heads=HEADS, head_dim=d), torch.randn(HEADS * d, 30, generator=generator(3)))
    tokens = text(160, vocabulary)
    caches = {mode: snapshot(mode, rows[tokens], noise) for mode in MODES}
    return Subject(layer, tokens, noise, caches, snapshot("session", rows[tokens], noise))


def by_mode(attacks: list[Attack], name: str | None = None) -> dict[str, Attack]:
    """The outcomes of one attack by mode, each once."""
    found = [attack for attack in attacks if name in (None, attack.name)]
    modes = {attack.scheme.removeprefix("kv-shield/"): attack for attack in found}
    expected = MODES[:-1] if found[0].name == "weights" else MODES  # sealing changes no weights
    assert tuple(modes) == expected and len(found) == len(expected)
    assert all(attack.weakened_value == modes["none"].value for attack in found)
    return modes
