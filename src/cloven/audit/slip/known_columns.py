"""Does a little knowledge of the scramble give the rest away?

Adversary: A1, who knows of two exposed matrices which columns of the residual stream some few of theirs are: from an earlier leak, say, or
    by trying all. Where columns are mixed it knows as many directions in both.
Method: groups of one kind in neighbouring layers. Where columns are permuted: cosines with the known ones, signs included, then with all
    that were found (Frank-Wolfe steps on the signed graphs). Where they are mixed: eigenvectors of the Gram matrices are told apart by
    what they have of the known directions, near their place in the spectrum, for three widths, and the matrices' roots are then aligned
    by polar steps; the best of these counts. The bundle's own scramble, and permutations alone beside it.
Success: the share of the rest of the basis that is found, as for unscrambling.
Weakened: a near-duplicate (1 % noise) under keys of its own; where they are mixed by rotations, with signs
    in the place of secret sizes, unrounded.
Source: seeded graph matching is published; the rest is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.slip.matching import Known, by_known, by_known_directions
from cloven.audit.slip.subject import Subject, compared
from cloven.audit.slip.unscrambling import MOST_PAIRS, Side, columns_side, over_matrices, pairs_of, planted, residual_sides

KNOWN = (4, 16, 64)  # columns that an attacker is given
_SMALL = 512  # columns up to which more than one pair is tried
MOST_COLUMNS = 2048  # the rotations are computed by many singular value decompositions


def share_from_known(a: Side, b: Side, known: Tensor) -> float:
    """The share of the rest of the basis that is found, when the model's columns `known` are known in both."""
    (x, ours), (y, theirs) = (a.matrix, a.basis), (b.matrix, b.basis)
    relation = ours @ theirs.t()  # [i, j]: the cosine of exposed column i of a and j of b
    if float(relation.abs().amax(1).min()) > 0.999:
        truth = relation.abs().argmax(1)
        mine = ours.abs().argmax(0)[known]
        match = by_known(x.t(), y.t(), Known(mine, truth[mine], relation[mine, truth[mine]].sign()))
        rest = torch.ones(len(truth), dtype=torch.bool)
        rest[mine] = False
        return float((match == truth)[rest].double().mean())
    ours, theirs = (torch.nn.functional.normalize(torch.linalg.inv(basis).t(), dim=0) for basis in (ours, theirs))  # images of columns
    rotations = by_known_directions(x, y, ours[:, known], theirs[:, known])
    rest = torch.ones(len(relation), dtype=torch.bool)
    rest[known] = False
    named = (rotation @ ours[:, rest] for rotation in rotations)  # what the attacker takes the model's other columns for in b
    return max(float(torch.nn.functional.cosine_similarity(one, theirs[:, rest], dim=0).square().mean()) for one in named)


@torch.no_grad()
def known_columns(subject: Subject) -> list[Attack]:
    """See the module."""
    return [attack for one in compared(subject) for attack in _attacks(one)]


def _attacks(subject: Subject) -> list[Attack]:
    sides = [side for side in residual_sides(subject) if side.group is not None and len(side.basis) <= MOST_COLUMNS]
    pairs = [(a, b) for a, b in pairs_of(sides) if a.name.rpartition(".")[2] == b.name.rpartition(".")[2]]
    pairs = pairs[: MOST_PAIRS if pairs and len(pairs[0][0].basis) <= _SMALL else 1]
    if not pairs or len(pairs[0][0].basis) <= KNOWN[0]:
        return []
    size = len(pairs[0][0].basis)
    order, group = torch.randperm(size, generator=subject.random("known columns")), pairs[0][0].group
    assert group is not None
    first, near = (columns_side(seen) for seen in planted(group.exposed, group.terms, mixed=subject.scramble == "mixing"))
    attacks = []
    for count in (count for count in KNOWN if 2 * count <= size):
        found = [(share_from_known(a, b, order[:count]), size - count) for a, b in pairs]
        weak = share_from_known(first, near, order[:count])
        metric = f"share of the rest of the basis found between matrices of one kind in neighbouring layers, {len(pairs)} pairs"
        adversary = f"A1, who knows {count} of {size} columns"
        attacks += over_matrices(subject, f"unscramble_from_{count}_known", adversary, metric, found, weak)
    return attacks
