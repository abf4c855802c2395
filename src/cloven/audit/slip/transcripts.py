"""Does what the worker received depend on the prompt?

Adversary: A1 and A8: the worker records every row of real generations through the wire, and knows or chooses the prompts.
Method: a real worker process records two generations from the same prompt. For every group: chi-square tests of the four byte planes of its
    residues against the uniform distribution; whether the same token of the same prompt gives rows that agree, or correlate, from one
    pass to the other; whether neighbouring tokens' rows correlate.
Success: the share of tests with p < 0.001 (chance: 0.001).
Weakened: for the first, numbers of 18 bits, as unmasked rows are small; for the others, rows that differ from the recorded ones by such
    numbers, as rows under one pad do.
Source: chi-square, Pearson; the use is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from cloven.audit.attack import Attack, Verdict
from cloven.audit.slip.recording import record
from cloven.audit.slip.subject import Subject
from cloven.field.residues import P

LEVEL = 0.001
_SURE = 1e-6  # p of the most unlikely test, times their number
PROMPT, NEW = 24, 24  # tokens
_SMALL = 2**18  # numbers of the weakened systems are below


def uniform_p(values: Tensor, bins: int) -> float:
    """p of a chi-square test of integers 0 … bins − 1 against the uniform distribution."""
    counts = torch.bincount(values.flatten().long(), minlength=bins).double()
    expected = counts.sum() / bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((bins - 1) / 2, dtype=torch.float64), statistic / 2))


def correlation_p(a: Tensor, b: Tensor) -> float:
    """p of the correlation of two lists of numbers, two-sided, by its normal limit."""
    a, b = a.flatten().double(), b.flatten().double()
    a, b = a - a.mean(), b - b.mean()
    r = float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))
    return math.erfc(abs(r) * math.sqrt(len(a) / 2))


def plane_tests(c: Tensor) -> list[float]:
    """p of the four byte planes of residues int32 [M, K]; the highest has 7 bits."""
    values = c.long() % P
    return [uniform_p((values >> (8 * plane)) & 255, 128 if plane == 3 else 256) for plane in range(4)]


def repeat_tests(first: dict[int, Tensor], second: dict[int, Tensor]) -> list[float]:
    """p per group that two passes over one text are as unlike as two random ones."""
    return [correlation_p(first[group], second[group]) for group in first]


def neighbour_tests(rows: dict[int, Tensor]) -> list[float]:
    """p per group that a token's row tells nothing of the next one's."""
    return [correlation_p(c[:-1], c[1:]) for c in rows.values() if len(c) > 1]


def rejected(ps: Iterable[float]) -> tuple[float, int]:
    """(share of tests below the level, tests)."""
    all_of_them = list(ps)
    return sum(p < LEVEL for p in all_of_them) / len(all_of_them), len(all_of_them)


@torch.no_grad()
def transcripts(subject: Subject) -> list[Attack]:
    """See the module."""
    first, second = record(subject, subject.text[:1, :PROMPT], 2, NEW)
    unmasked = {group: c % _SMALL for group, c in first.items()}
    small = {group: torch.randint(0, _SMALL, c.shape, generator=subject.random("rows")) for group, c in first.items()}
    reused = {group: c + small[group] for group, c in first.items()}  # the second pass under the first one's pads
    same_pad = {group: c[:1] + small[group] for group, c in first.items()}  # every token under one pad
    found = []
    for name, what, real, weak in (
        (
            "transcript_uniform",
            "byte planes",
            [p for c in first.values() for p in plane_tests(c)],
            [p for c in unmasked.values() for p in plane_tests(c)],
        ),
        ("transcript_repeated_prompt", "groups, one prompt twice", repeat_tests(first, second), repeat_tests(first, reused)),
        ("transcript_neighbours", "groups, tokens and their successors", neighbour_tests(first), neighbour_tests(same_pad)),
    ):
        value, tries = rejected(real)
        likely = LEVEL * tries + 3 * math.sqrt(LEVEL * tries)
        sure = min(real) * tries < _SURE  # a pad used again in one group alone
        verdict: Verdict = "broken" if value >= 0.5 or sure else "holds" if value * tries <= max(1.0, likely) else "measured"
        metric = f"share of tests ({what}) that tell what a worker recorded from noise, at p < {LEVEL}"
        found.append(Attack(name, subject.scheme, "A1 and A8, with a recording", metric, value, LEVEL, rejected(weak)[0], tries, verdict))
    return found
