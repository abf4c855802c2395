"""Does the exposed half show where the secret was?

Adversary: A1, the curious worker, in its best case: it knows the rank k of every matrix, the scramble and all scales.
Method: removing the top k singular triples leaves U_k and V_k as the directions in which nothing is left. Take the SVD of the exposed
    matrix, choose vectors that stand out (at the bottom of the spectrum, where a hole would be; at the top, where the secret was; by
    singular values that nearly coincide, as copied ones would; by peaked entries), and see how much of U_k and V_k they span.
Success: ‖Xᵀ U_k‖² / k above the share of all vectors that were chosen, which is chance. Averaged over matrices, weighted by k.
Weakened: the plain SVD split, without the decoy.
Source: the attack on published SVD splits is ours; so is the decoy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.slip.subject import Subject
from cloven.slip.exposed_matrix import expose

MOST_MATRICES = 12  # those with most secret directions
MOST_ENTRIES = 2**24  # of a matrix whose exact SVD is computed


@dataclass(frozen=True)
class View:
    """What an attacker computes from one exposed matrix, and what it looks for."""

    k: int
    values: Tensor
    left: Tensor
    right: Tensor
    secret_left: Tensor
    secret_right: Tensor

    @classmethod
    def of(cls, exposed: Tensor, weight: Tensor, k: int) -> View:
        """Of E [N, K], and W, whose top k directions are secret."""
        u, s, vt = torch.linalg.svd(exposed.double(), full_matrices=False)
        secret_u, _, secret_vt = torch.linalg.svd(weight.double(), full_matrices=False)
        return cls(k, s, u, vt.t(), secret_u[:, :k], secret_vt[:k].t())


def bottom(view: View, vectors: Tensor) -> Tensor:
    """Where a hole would be."""
    del vectors
    return torch.arange(len(view.values) - view.k, len(view.values))


def top(view: View, vectors: Tensor) -> Tensor:
    """Where the secret was."""
    del vectors
    return torch.arange(view.k)


def closest_pairs(view: View, vectors: Tensor) -> Tensor:
    """Vectors whose singular values nearly coincide: a random matrix's repel each other, something that was put in does not."""
    del vectors
    gaps = (view.values[:-1] - view.values[1:]) / view.values[:-1]
    first = gaps.argsort()[: view.k]
    both: Tensor = torch.cat([first, first + 1]).unique()
    return both


def peaked(view: View, vectors: Tensor) -> Tensor:
    """A trained layer's top singular vectors are more peaked than its others."""
    order: Tensor = vectors.pow(4).sum(0).argsort(descending=True)
    return order[: 2 * view.k]


CHOOSERS: tuple[Callable[[View, Tensor], Tensor], ...] = (bottom, top, closest_pairs, peaked)


def side(views: list[View], choose: Callable[[View, Tensor], Tensor], number: int) -> tuple[float, float]:
    """(share, chance) on the left (0) or the right (1) for the vectors that an attacker chooses."""
    found = chance = 0.0
    for view in views:
        vectors, secret = ((view.left, view.secret_left), (view.right, view.secret_right))[number]
        chosen = choose(view, vectors)
        found += float((vectors[:, chosen].t() @ secret).square().sum())
        chance += view.k * len(chosen) / len(view.values)
    total = sum(view.k for view in views)
    return found / total, chance / total


def share(views: list[View], choose: Callable[[View, Tensor], Tensor]) -> tuple[float, float]:
    """The same on the side that shows more."""
    return max((side(views, choose, number) for number in (0, 1)), key=lambda both: both[0] - both[1])


def null_space(subject: Subject) -> list[Attack]:
    """See the module."""
    matrices = [
        (group.exposed[rows], group.weight(part), member.secret_a.shape[0])
        for group in subject.groups
        for part, (member, rows) in enumerate(group.parts)
        if member.secret_a.shape[0] and group.exposed[rows].numel() <= MOST_ENTRIES
    ]
    matrices = sorted(matrices, key=lambda matrix: -matrix[2])[:MOST_MATRICES]
    if not matrices:
        return []
    terms = subject.groups[0].terms
    real = [View.of(*matrix) for matrix in matrices]
    weakened = [View.of(_hollow(weight, k, terms), weight, k) for _, weight, k in matrices]
    total = sum(view.k for view in real)
    found = []
    for choose in CHOOSERS:
        value, chance = share(real, choose)
        verdict = verdict_of(value, chance, total)
        found.append(
            Attack(
                f"null_space_{choose.__name__}",
                subject.scheme,
                "A1, who knows the scramble and all scales",
                f"share of the {total} secret directions of {len(real)} matrices that the chosen singular vectors of the exposed half span",
                value,
                chance,
                share(weakened, choose)[0],
                total,
                verdict,
            )
        )
    return found


def _hollow(weight: Tensor, k: int, terms: int) -> Tensor:
    """R = W − U_k Σ_k V_kᵀ, quantised like an exposed matrix."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return expose(weight.double() - (u[:, :k] * s[:k]) @ vt[:k], terms, None).dequantised()
