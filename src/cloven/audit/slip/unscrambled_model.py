"""What does unscrambling buy without a public relative?

Adversary: A1, given embeddings, norms, biases and scales, and nothing like the model.
Method: in every matrix the side that reads or writes the residual stream is brought into the embeddings' basis: by eigenvectors of both
    Gram matrices in the order of their eigenvalues, pointing the way in which their third moments agree; of permuted ones by the graph of
    cosines, with such signs. The other side stays as it lies: nothing public has its basis. Then the model is run.
Success: the share of what the model knows of the text, as for the exposed half. Chance: that of the codes as they lie.
Weakened: something public is like the model, and nothing secret: every matrix, whole, is brought into the basis of its own near-duplicate
    (1 % noise), on both sides.
Source: ours; the measure is the exposed half's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.slip.exposed_half import as_they_lie, knowledge, verdict_beside
from cloven.audit.slip.matching import by_eigenvectors, by_graph
from cloven.audit.slip.scrambled import sizes_of
from cloven.audit.slip.subject import AttackedGroup, Subject, compared
from cloven.audit.slip.unscrambling import MOST_PLACES, embeddings, planted, residual_sides, writes
from cloven.audit.slip.weight_directions import guess
from cloven.slip.exposed_matrix import expose
from cloven.zoo.text import perplexity


def agreeing(ours: Tensor, theirs: Tensor) -> Tensor:
    """±1 for every column of two matrices, [n, h] and [m, h]: whether their third moments have one sign."""
    signs: Tensor = torch.where(ours.pow(3).sum(0) * theirs.pow(3).sum(0) < 0, -1.0, 1.0)
    return signs


def into(matrix: Tensor, table: Tensor, *, mixed: bool) -> Tensor:
    """A matrix [n, h] with its columns in the basis of a table's [m, h], as far as they are matched."""
    if mixed:
        ours, theirs = by_eigenvectors(matrix), by_eigenvectors(table)
        return ((matrix @ ours) * agreeing(matrix @ ours, table @ theirs)) @ theirs.t()
    match = by_graph(matrix.t(), table.t())
    placed = torch.empty_like(matrix)
    placed[:, match] = matrix * agreeing(matrix, table[:, match])
    return placed


@torch.no_grad()
def unscrambled_by_embeddings(subject: Subject) -> list[Attack]:
    """See the module."""
    return [attack for one in compared(subject) for attack in _attack(one)]


def _attack(subject: Subject) -> list[Attack]:
    sides, mixed = residual_sides(subject), subject.scramble == "mixing"
    table = embeddings(subject)
    sides = [side for side in sides if side.matrix.shape[1] == table.shape[1]]
    if not sides:
        return []
    ordered = dict[int, Tensor]()
    for side in sides:
        assert side.group is not None
        found = into(side.matrix, table, mixed=mixed)
        ordered[side.group.group.index] = found.t() if writes(side) else found

    def attacker(group: AttackedGroup, part: int) -> Tensor:
        if group.group.index not in ordered:
            return as_they_lie(group, part)
        rows, columns = group.sizes()
        matrix: Tensor = ordered[group.group.index] * rows[:, None] * columns
        return matrix[group.parts[part][1]]

    reached, lying, known = (
        perplexity(subject.with_matrices(matrix), subject.text) for matrix in (attacker, as_they_lie, _by_near_duplicates(subject))
    )
    value, chance, weak = (knowledge(one, subject) for one in (reached, lying, known))
    tokens, given = subject.text[:, 1:].numel(), "A1, given embeddings, norms and scales"
    metric = (
        f"share of the model's knowledge of {tokens} tokens that the exposed half has when {len(sides)} of {len(subject.groups)} groups "
        "are put into the embeddings' basis"
    )
    details = {"perplexity": reached, "perplexity_as_they_lie": lying}
    verdict = verdict_beside(value, chance)
    return [Attack("unscrambled_by_embeddings", subject.scheme, given, metric, value, chance, weak, tokens, verdict, details=details)]


def _by_near_duplicates(subject: Subject) -> Callable[[AttackedGroup, int], Tensor]:
    """The weakened system's matrices."""

    @functools.cache
    def known(group: AttackedGroup) -> Tensor:
        whole, mixed = torch.cat([group.weight(part) for part in range(len(group.parts))]), subject.scramble == "mixing"
        n, c = sizes_of(expose(whole, group.terms, subject.stream(f"known {group.name}"), mixed=mixed))
        reference = whole / n[:, None] / c if mixed else expose(whole, 1, None).codes.float()
        near, size = planted(whole, group.terms, mixed=mixed)[1], whole.shape
        found: Tensor = guess(near, reference, (torch.eye(size[0]), torch.eye(size[1])), mixed=mixed).matrix
        return found * n[:, None] * c

    def matrix(group: AttackedGroup, part: int) -> Tensor:
        if max(group.exposed.shape) > MOST_PLACES:
            return group.weight(part)
        return known(group)[group.parts[part][1]]

    return matrix
