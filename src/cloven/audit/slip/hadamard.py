"""Would a Hadamard transform in the place of, or on top of, the permutations hide more?

Adversary: A1, as for the scramble in use. This is an experiment on a scramble that bundles do not use.
Method: the bundle's matrices are scrambled with fresh keys and both sides multiplied with a Hadamard matrix, then quantised. The
    matrix is public: the attacker undoes it first, which leaves the permutations, the signs and some noise of quantisation. Columns are
    then matched between groups and with the embeddings as before.
Success: the share of places found. With signs in the place of permutations all places are in plain sight once it is undone.
Weakened: a near-duplicate (1 % noise) under a second scramble of this kind, aligned on both sides.
Source: randomised Hadamard transforms are used to spread outliers before quantisation; the use as a scramble is ours.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.slip.matching import aligned_to, by_graph, by_profiles
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.audit.slip.unscrambling import MOST_PAIRS, MOST_PLACES, embeddings, hits, over_matrices, residual_groups, with_noise
from cloven.field.prg import SecretStream
from cloven.slip.exposed_matrix import expose


def transform(matrix: Tensor) -> Tensor:
    """Each row times the orthogonal Hadamard matrix, in blocks of the largest power of two that divides its length; its own inverse."""
    n, k = matrix.shape
    block = k & -k
    rows, width = matrix.reshape(-1, block), 1
    while width < block:
        first, second = rows.view(-1, block // (2 * width), 2, width).unbind(2)
        rows = torch.stack([first + second, first - second], 2).view(-1, block)
        width *= 2
    result: Tensor = (rows / block**0.5).view(n, k)
    return result


def both_sides(matrix: Tensor) -> Tensor:
    """H M H."""
    return transform(transform(matrix).t().contiguous()).t().contiguous()


def seen(matrix: Tensor, stream: SecretStream) -> tuple[Tensor, Tensor, Tensor]:
    """What is left after the attacker undid the transform: (matrix [N, K], places of its rows, places of its columns)."""
    flat = expose(matrix, 1, None).codes.float()  # equalised, as the scramble in use
    rows, columns = stream.permutation(len(flat)), stream.permutation(flat.shape[1])
    scrambled = flat[rows][:, columns] * stream.signs(len(flat))[:, None].float() * stream.signs(flat.shape[1]).float()
    codes = expose(both_sides(scrambled), 1, None)
    return both_sides(codes.dequantised().float()), rows, columns


def _small(groups: list[AttackedGroup]) -> list[AttackedGroup]:
    return [group for group in groups if max(group.exposed.shape) <= MOST_PLACES]


@torch.no_grad()
def hadamard(subject: Subject) -> list[Attack]:
    """See the module."""
    groups = _small(residual_groups(subject))[: MOST_PAIRS + 1]
    if not subject.scrambled or len(groups) < 2:
        return []
    views = [seen(group.exposed, subject.stream(f"hadamard {number}")) for number, group in enumerate(groups)]
    table, places = embeddings(subject), groups[0].exposed.shape[1]
    twin, rows, columns = seen(with_noise(groups[0].exposed), subject.stream("hadamard, planted"))
    found = aligned_to(views[0][0], twin)
    weak = min(hits(found.rows, views[0][1], rows), hits(found.columns, views[0][2], columns))
    attacks = []
    for how, matcher in (("magnitudes", by_profiles), ("graph", by_graph)):
        between = [(hits(matcher(a[0].t(), b[0].t()), a[2], b[2]), places) for a, b in itertools.pairwise(views)]
        metric = "share of columns matched between groups of one residual stream, under a Hadamard transform that the attacker undoes"
        attacks += over_matrices(subject, f"unscramble_hadamard_by_{how}", "A1", metric, between, weak)
    against = [(hits(by_graph(a[0].t(), table.t()), a[2], torch.arange(places)), places) for a in views]
    metric = "share of columns matched with the embeddings' columns, under a Hadamard transform that the attacker undoes"
    return attacks + over_matrices(subject, "unscramble_hadamard_by_embeddings", "A1, given the embeddings", metric, against, weak)
