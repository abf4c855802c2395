"""Does a public relative undo the scramble?

Adversary: A1, who has a public relative of the model: its base, an earlier release, another fine-tune of it.
Method: every exposed matrix is compared with the relative's, less its own top singular part. Where places are permuted, rows, columns and
    signs are aligned: first by what permutations and signs leave alone, then by turns by their directions, given the other side; where
    that leads nowhere, from the graph of one side's cosines, or from soft permutations (Sinkhorn). Where they are mixed, singular vectors
    are paired in the order of singular values: of all rotations the one that brings both matrices closest. Then the model is put
    together in the relative's basis, with the relative's own top part in the secret's place and the scales given for free, and run.
    The bundle's own scramble, and permutations beside it.
Success: the share of rows' and of columns' basis found, as for unscrambling; of places, with an interval of 95 %, where the scramble
    permutes. And the share of the model's knowledge that this model has, beyond the relative's own.
Weakened: a near-duplicate (1 % noise) of the bundle's squarest matrix, under keys of its own; for the knowledge, the model itself.
Source: matching of weight directions with a public model is published for obfuscated weights; the alternation and the soft start are ours.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.slip.exposed_half import as_they_lie, knowledge, relatives_secret, verdict_beside
from cloven.audit.slip.matching import Alignment, aligned_to
from cloven.audit.slip.null_space import without_top
from cloven.audit.slip.scrambled import Scrambled, in_the_model, share_of
from cloven.audit.slip.subject import AttackedGroup, Subject, compared
from cloven.audit.slip.unscrambling import MOST_PLACES, over_matrices, planted
from cloven.slip.exposed_matrix import expose
from cloven.zoo.text import perplexity


@dataclass(frozen=True, repr=False, eq=False)
class Guess:
    """What an attacker makes of one matrix: in the relative's basis, float32 [N, K]; which share of both bases is right; and the alignment,
    where places are permuted."""

    matrix: Tensor
    rows: float
    columns: float
    alignment: Alignment | None


def guess(seen: Scrambled, reference: Tensor, truth: tuple[Tensor, Tensor], *, mixed: bool) -> Guess:
    """Align a scrambled matrix with a reference, whose rows and columns are truth[0] and truth[1] in the model's."""
    if not mixed:
        found = aligned_to(seen.codes, reference)
        rows, columns = share_of(found.rows, seen.rows, truth[0]), share_of(found.columns, seen.columns, truth[1])
        return Guess(found.applied(seen.codes), rows, columns, found)
    u, s, vt = torch.linalg.svd(seen.codes, full_matrices=False)
    p, _, qt = torch.linalg.svd(_even(reference), full_matrices=False)
    pairs = ((seen.rows, u, truth[0], p), (seen.columns, vt.t(), truth[1], qt.t()))
    rows, columns = (
        float((in_the_model(ours, mine) * in_the_model(theirs, other)).sum(0).square().sum()) / len(ours)
        for ours, mine, theirs, other in pairs
    )
    return Guess((p * s) @ qt, rows, columns, None)


def _even(matrix: Tensor) -> Tensor:
    """Rows of one size, as they are before they are mixed."""
    return matrix / matrix.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)


@functools.lru_cache(maxsize=2)
def guesses(subject: Subject) -> tuple[Guess | None, ...]:
    """The best guess of every group's scramble, by the relative. None: there is no relative, or the matrix is too large."""
    if subject.relative is None:
        return (None,) * len(subject.groups)
    return tuple(_of_relative(subject, group) if max(group.exposed.shape) <= MOST_PLACES else None for group in subject.groups)


def _of_relative(subject: Subject, group: AttackedGroup) -> Guess:
    n, k = group.exposed.shape
    return guess(group.seen, reference(subject, group), (torch.eye(n), torch.eye(k)), mixed=subject.scramble == "mixing")


def reference(subject: Subject, group: AttackedGroup) -> Tensor:
    """What the relative's exposed matrix would be, in its own order: float32 [N, K]."""
    public = torch.cat([without_top(subject.relative_weight(member), member.secret_a.shape[0]) for member, _ in group.parts])
    return expose(public, 1, None).codes.float()


def aligned_matrix(subject: Subject, group: AttackedGroup, part: int) -> Tensor:
    """One member's matrix as an attacker puts it in order, with the relative's own part for the secret's: float32 [N, K].

    As it lies where there is no guess. Scales are given.
    """
    found = guesses(subject)[subject.groups.index(group)]
    if found is None:
        return as_they_lie(group, part)
    rows, columns = group.sizes()
    matrix: Tensor = found.matrix * rows[:, None] * columns
    member, own = group.parts[part]
    return relatives_secret(matrix[own], member.secret_a.shape[0], subject.relative_weight(member))


@torch.no_grad()
def weight_directions(subject: Subject) -> list[Attack]:
    """See the module."""
    if subject.relative is None or all(max(group.exposed.shape) > MOST_PLACES for group in subject.groups):
        return []
    return [attack for one in compared(subject) for attack in _attacks(one)]


def _attacks(subject: Subject) -> list[Attack]:
    attacks, adversary = list[Attack](), "A1, who has a public relative"
    fitting = [one for one in subject.groups if max(one.exposed.shape) <= MOST_PLACES]
    group = max(
        fitting, key=lambda one: min(one.exposed.shape) / max(one.exposed.shape)
    )  # of others, rows have no directions beyond the rank
    mixed = subject.scramble == "mixing"
    first, near = planted(group.exposed, group.terms, mixed=mixed)
    if mixed:  # the relative's basis is known: here the matrix's own
        (n, c), sizes = group.sizes(), group.exposed.shape
        weak = guess(near, group.exposed / n[:, None] / c, (torch.eye(sizes[0]), torch.eye(sizes[1])), mixed=True)
    else:
        weak = guess(near, first.codes, (first.rows, first.columns), mixed=False)
    pairs = [(one, found) for one, found in zip(subject.groups, guesses(subject), strict=True) if found is not None]
    for which, share in (("rows", weak.rows), ("columns", weak.columns)):
        side = 0 if which == "rows" else 1
        shares = [(getattr(found, which), one.exposed.shape[side]) for one, found in pairs]
        metric = f"share of the basis of {which} found with the relative's"
        attacks += over_matrices(subject, f"unscramble_{which}_by_relative", adversary, metric, shares, share)
    model = subject.with_matrices(lambda group, part: aligned_matrix(subject, group, part))
    assert subject.relative is not None
    reached, tokens = perplexity(model, subject.text), subject.text[:, 1:].numel()
    own = max(0.0, knowledge(perplexity(subject.relative, subject.text), subject))
    value, whole = knowledge(reached, subject), knowledge(math.exp(subject.nats), subject)
    metric = (
        f"share of the model's knowledge of {tokens} tokens that the exposed half has in the relative's basis, with the relative's part "
        "for the secret's; chance: the relative's own"
    )
    given, verdict = "A1, given embeddings, norms and scales, who has a public relative", verdict_beside(value, own)
    details = {"perplexity": reached}
    return [*attacks, Attack("unscrambled_model", subject.scheme, given, metric, value, own, whole, tokens, verdict, details=details)]
