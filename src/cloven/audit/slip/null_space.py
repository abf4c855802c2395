"""Does the exposed half show where the secret was?

Adversary: A1, the curious worker, in its best case: it knows the rank k of every matrix, the scramble and all scales. And once as it
    is: it has the codes of a group as they lie.
Method: removing the top k singular triples leaves U_k and V_k as the directions in which nothing is left. Take the SVD of the exposed
    matrix, choose vectors that stand out (at the bottom of the spectrum, where a hole would be; at the top, where the secret was; by
    singular values that nearly coincide, as copied ones would; by peaked entries), and see how much of U_k and V_k they span. With the
    bundle's precision, and on a new split of the same matrices with the other one.
Success: ‖Xᵀ U_k‖² / k above the share of all vectors that were chosen, which is chance; on the side that shows more, left or right.
    Averaged over matrices, weighted by k.
Weakened: the plain SVD split, without the decoy; scrambled too where the attacked one is.
Source: the attack on published SVD splits is ours; so is the decoy.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.decomposition import spectrum, split
from cloven.slip.exposed_matrix import ExposedMatrix, expose

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

    @classmethod
    def as_it_lies(cls, made: ExposedMatrix, group: AttackedGroup) -> View:
        """Of a group's first int8 term, scrambled and without scales: secret directions in the codes' own coordinates."""
        order = made.row_gather[0].long().sort()  # the rows of the first term as they lie, and which of the model's each is
        u, s, vt = torch.linalg.svd(made.codes[order.values].double(), full_matrices=False)
        lefts, rights = [], []
        for part, (member, _) in enumerate(group.parts):
            k = member.secret_a.shape[0]
            secret_u, _, secret_vt = torch.linalg.svd(group.weight(part).double(), full_matrices=False)
            lefts.append(secret_u[:, :k])
            rights.append(secret_vt[:k].t())
        left = torch.block_diag(*lefts)[order.indices] / made.row_scale[0].double()[order.indices, None]
        right = torch.cat(rights, 1)[made.column_gather.long()] / made.column_scale.double()[:, None]
        return cls(left.shape[1], s, u, vt.t(), torch.linalg.qr(left)[0], torch.linalg.qr(right)[0])


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
    chosen = sorted(
        (
            (group, part)
            for group in subject.groups
            for part, (member, rows) in enumerate(group.parts)
            if member.secret_a.shape[0] and group.exposed[rows].numel() <= MOST_ENTRIES
        ),
        key=lambda at: -at[0].parts[at[1]][0].secret_a.shape[0],
    )[:MOST_MATRICES]
    if not chosen:
        return []
    terms = chosen[0][0].terms
    best_case = "A1, who knows the scramble and all scales"
    real = [View.of(group.exposed[group.parts[part][1]], group.weight(part), _rank(group, part)) for group, part in chosen]
    found = _attacks(subject, "", best_case, real, _hollows(chosen, terms))
    other, precision = (2, "int8x2") if terms == 1 else (1, "int8")
    again = [
        View.of(_split_again(group.weight(part), _rank(group, part), other), group.weight(part), _rank(group, part))
        for group, part in chosen
    ]
    found += _attacks(subject, f"_{precision}", best_case, again, _hollows(chosen, other))
    groups = [group for group in dict.fromkeys(group for group, _ in chosen) if group.exposed.numel() <= MOST_ENTRIES]
    if subject.scrambled and groups:
        lying = [View.as_it_lies(group.stored(), group) for group in groups]
        found += _attacks(subject, "_scrambled", "A1", lying, [View.as_it_lies(_hollow_group(group), group) for group in groups])
    return found


def _attacks(subject: Subject, which: str, adversary: str, real: list[View], weakened: list[View]) -> list[Attack]:
    total, found = sum(view.k for view in real), []
    metric = f"share of the {total} secret directions of {len(real)} matrices that the chosen singular vectors of the exposed half span"
    for choose in CHOOSERS:
        (left, _), (right, _) = side(real, choose, 0), side(real, choose, 1)
        value, chance = share(real, choose)
        name, verdict, details = f"null_space_{choose.__name__}{which}", verdict_of(value, chance, total), {"left": left, "right": right}
        weak = share(weakened, choose)[0]
        found.append(Attack(name, subject.scheme, adversary, metric, value, chance, weak, total, verdict, details=details))
    return found


def _rank(group: AttackedGroup, part: int) -> int:
    return int(group.parts[part][0].secret_a.shape[0])


def _split_again(weight: Tensor, k: int, terms: int) -> Tensor:
    """E of a split of its own, with the decoy, quantised."""
    exposed = split(weight, k, spectrum(weight), SecretStream(secrets.token_bytes(KEY_BYTES), "audit")).exposed
    return expose(exposed, terms, None).dequantised()


def _hollows(chosen: list[tuple[AttackedGroup, int]], terms: int) -> list[View]:
    matrices = ((group.weight(part), _rank(group, part)) for group, part in chosen)
    return [View.of(hollow(weight, k, terms), weight, k) for weight, k in matrices]


def hollow(weight: Tensor, k: int, terms: int) -> Tensor:
    """R = W − U_k Σ_k V_kᵀ, quantised like an exposed matrix."""
    return expose(_without(weight, k), terms, None).dequantised()


def _hollow_group(group: AttackedGroup) -> ExposedMatrix:
    stack = torch.cat([_without(group.weight(part), _rank(group, part)) for part in range(len(group.parts))])
    return expose(stack, group.terms, SecretStream(secrets.token_bytes(KEY_BYTES), "audit"))


def _without(weight: Tensor, k: int) -> Tensor:
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    rest: Tensor = weight.double() - (u[:, :k] * s[:k]) @ vt[:k]
    return rest
