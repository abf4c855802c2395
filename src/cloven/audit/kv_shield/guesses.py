"""What the attacks have in common: the nearest row, and one outcome for every mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.kv_shield.subject import Subject

THIEF = "has the public model and a snapshot of the cache"
DEVICE = "has the public model and the device's weights"


def nearest(rows: Tensor, table: Tensor) -> Tensor:
    """For each row [T, W] the number of the nearest row of the table [N, W], by L1."""
    return torch.cat([torch.cdist(part, table, p=1).argmin(1) for part in rows.split(64)])


def hits(guesses: Tensor, truth: Tensor) -> float:
    """Share of right guesses."""
    return float((guesses == truth).double().mean())


def in_every_mode(name: str, metric: str, values: Mapping[str, float], chance: float, tries: int, adversary: str = THIEF) -> list[Attack]:
    """One attack's outcome in every mode; `none` is the system without the protection."""
    return [
        Attack(name, f"kv-shield/{mode}", adversary, metric, value, chance, values["none"], tries, verdict_of(value, chance, tries))
        for mode, value in values.items()
    ]


def every_token(subject: Subject, name: str, guess: Callable[[Tensor, Tensor], Tensor]) -> list[Attack]:
    """An attack that guesses every token by itself: `guess(rows, table)` gives int64 [T]."""
    found = {mode: hits(guess(rows, subject.layer.table), subject.tokens) for mode, rows in subject.caches.items()}
    return in_every_mode(name, "fraction of tokens recovered", found, subject.chance, len(subject.tokens))
