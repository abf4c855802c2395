"""Does a public relative undo the scramble?

Adversary: A1, who has a public relative of the model: its base, an earlier release, another fine-tune of it.
Method: rows and columns of every exposed matrix are aligned with the relative's, less its own top singular part: first by what
    permutations and signs leave alone, then by turns by their directions, given the other side; where that leads nowhere, from the
    graph of one side's cosines, or from soft permutations (Sinkhorn). Then the model is put together in the relative's order, with
    the scales given for free, and run.
Success: the share of places found, with an interval of 95 %; chance: 1 / places. And the share of the model's knowledge that the
    aligned matrices keep, without the secret part.
Weakened: a second scramble of a near-duplicate (1 % noise) of the bundle's own matrices; for the knowledge, the model itself.
Source: matching of weight directions with a public model is published for obfuscated weights; the alternation and the soft start are ours.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.slip.exposed_half import as_they_lie, knowledge
from cloven.audit.slip.matching import Alignment, aligned_to
from cloven.audit.slip.null_space import without_top
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.audit.slip.unscrambling import MOST_PLACES, hits, near_duplicate, over_matrices
from cloven.slip.exposed_matrix import expose
from cloven.zoo.text import perplexity


@functools.lru_cache(maxsize=1)
def alignments(subject: Subject) -> tuple[Alignment | None, ...]:
    """The best guess of every group's scramble, by the relative. None: there is no relative, or the matrix is too large."""
    return tuple(
        None
        if subject.relative is None or max(group.exposed.shape) > MOST_PLACES
        else aligned_to(group.coarse()[0], reference(subject, group))
        for group in subject.groups
    )


def reference(subject: Subject, group: AttackedGroup) -> Tensor:
    """What the relative's exposed matrix would be, in its own order: float32 [N, K]."""
    public = torch.cat([without_top(subject.relative_weight(member), member.secret_a.shape[0]) for member, _ in group.parts])
    return expose(public, 1, None).codes.float()


def aligned_matrix(subject: Subject, group: AttackedGroup, part: int) -> Tensor:
    """One member's matrix as an attacker puts it in order; as it lies where there is no guess. Scales are given. Float32 [N, K]."""
    guess = alignments(subject)[subject.groups.index(group)]
    if guess is None:
        return as_they_lie(group, part)
    rows, columns = group.sizes()
    matrix: Tensor = guess.applied(group.coarse()[0]) * rows[:, None] * columns
    return matrix[group.parts[part][1]]


def _planted(subject: Subject) -> tuple[float, float]:
    """Shares of rows and of columns found with a near-duplicate of the first matrix that is not too large."""
    group = next(one for one in subject.groups if max(one.exposed.shape) <= MOST_PLACES)
    codes, rows, columns = near_duplicate(group.exposed, group.terms)
    seen, truth = group.coarse()
    found = aligned_to(seen, codes)
    return hits(found.rows, truth, rows), hits(found.columns, group.columns, columns)


@torch.no_grad()
def weight_directions(subject: Subject) -> list[Attack]:
    """See the module."""
    if not subject.scrambled or subject.relative is None or all(max(group.exposed.shape) > MOST_PLACES for group in subject.groups):
        return []
    attacks = []
    pairs = [(group, guess) for group, guess in zip(subject.groups, alignments(subject), strict=True) if guess is not None]
    adversary, (weak_rows, weak_columns) = "A1, who has a public relative", _planted(subject)
    rows = [(hits(guess.rows, group.coarse()[1], torch.arange(len(guess.rows))), len(guess.rows)) for group, guess in pairs]
    columns = [(hits(guess.columns, group.columns, torch.arange(len(guess.columns))), len(guess.columns)) for group, guess in pairs]
    for which, found, weak in (("rows", rows, weak_rows), ("columns", columns, weak_columns)):
        metric = f"share of {which} matched with the relative's"
        attacks += over_matrices(subject, f"unscramble_{which}_by_relative", adversary, metric, found, weak)
    model = subject.with_matrices(lambda group, part: aligned_matrix(subject, group, part))
    reached, tokens = perplexity(model, subject.text), subject.text[:, 1:].numel()
    value, weak = knowledge(reached, subject), knowledge(math.exp(subject.nats), subject)
    metric = f"share of the model's knowledge of {tokens} tokens that the exposed half keeps when it is put in order by the relative"
    adversary, verdict = "A1, given embeddings, norms and scales, who has a public relative", verdict_of(value, 0.0, tokens)
    details = {"perplexity": reached}
    return [*attacks, Attack("unscrambled_model", subject.scheme, adversary, metric, value, 0.0, weak, tokens, verdict, details=details)]
