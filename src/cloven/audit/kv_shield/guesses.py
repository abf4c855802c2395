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
    """One attack's outcome in every mode; `none` is the system without the protection. Where the attack fails on that, nothing follows."""
    works, found = verdict_of(values["none"], chance, tries) == "broken", []
    for mode, value in values.items():
        verdict, said = verdict_of(value, chance, tries), metric
        if verdict == "holds" and not works:
            verdict, said = "measured", f"{metric}; it hardly works without the protection: no conclusion"
        found.append(Attack(name, f"kv-shield/{mode}", adversary, said, value, chance, values["none"], tries, verdict))
    return found


def every_token(subject: Subject, name: str, guess: Callable[[Tensor, Tensor], Tensor]) -> list[Attack]:
    """An attack that guesses every token by itself: `guess(rows, table)` gives int64 [T]."""
    found = {mode: hits(guess(rows, subject.layer.table), subject.tokens) for mode, rows in subject.caches.items()}
    return in_every_mode(name, "fraction of tokens recovered", found, subject.chance, len(subject.tokens))
