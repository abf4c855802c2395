"""Does the second moment of the codes show how they were mixed?

Adversary: A1, who holds all exposed matrices, and knows nothing else.
Method: a mixing's outermost transform leaves a trace in the Gram matrix of what it mixed if secret sizes lie right behind it: H D² H in a
    secret order, which commutes with 255 signed permutations without fixed points. One of them is looked for by softened quadratic
    assignment of the Gram matrix (its eigenvalues bounded) with itself, from several starts; averaged over eight of them, the matrix spells
    the outermost permutation. Tried on the narrow side of matrices that are at least twice as long: there the Gram matrix is least noisy.
Success: the share of places that the best permutation found moves as one of the mixing's own does. Broken: a permutation with which a
    Gram matrix commutes (beyond 0.2, where chance stays below 0.12): its finder knows that it is right. Chance: that of the same
    permutation where the places are shuffled.
Weakened: a mixing in two rounds, with the sizes right behind the outermost transform, as cloven's was: Gaussian rows, eight times as many
    as columns.
Source: a reviewer's attack on cloven's own earlier scramble; quadratic assignment by Vogelstein et al. 2015.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cloven.audit.attack import Attack, Verdict, interval_of
from cloven.audit.slip.scrambled import coarse
from cloven.audit.slip.subject import Subject
from cloven.field.hadamard import block_of
from cloven.field.prg import SecretStream
from cloven.slip.exposed_matrix import ExposedMatrix
from cloven.slip.mixing import COLUMNS, Mixing

SURE = 0.2  # of `symmetry`'s second result: found, beyond doubt
MOST_VECTORS = 1024
MOST_SIDES = 6
_TRIES = {256: 20, 1024: 2}  # by the most vectors
_LEAST_VECTORS = 256  # of fewer, Gram matrices commute with something by chance
_RIDGE, _STEPS, _NOISE, _SHUFFLES = 0.4, 30, 0.5, 20


def moment(vectors: Tensor) -> Tensor:
    """λ / (λ + 0.4) of the vectors' Gram matrix, λ in medians, without its diagonal: [n, m] -> float64 [n, n]."""
    u, s, _ = torch.linalg.svd(torch.nn.functional.normalize(vectors.double(), dim=1), full_matrices=False)
    values = s.square() / s.square().median()
    result: Tensor = (u * (values / (values + _RIDGE))) @ u.t()
    result.fill_diagonal_(0)
    return result.div_(result.std())


def _soft(gradient: Tensor, heat: float) -> Tensor:
    likeness = (gradient.abs() / gradient.std() * heat).fill_diagonal_(-1e9)
    kernel = (likeness - likeness.amax(1, keepdim=True)).exp()
    for _ in range(12):
        kernel = kernel / kernel.sum(1, keepdim=True)
        kernel = kernel / kernel.sum(0, keepdim=True)
    return (kernel + kernel.t()) / 2 * gradient.sign()


def _hard(gradient: Tensor) -> Tensor:
    rows, columns = linear_sum_assignment((-gradient.abs()).fill_diagonal_(1e9).numpy())
    result = torch.zeros_like(gradient)
    result[rows, columns] = gradient[rows, columns].sign()
    return result


def symmetry(vectors: Tensor, random: torch.Generator, tries: int) -> tuple[Tensor, float]:
    """A signed permutation P without fixed points that leaves the second moment M alone, and tr(P M Pᵀ M) / tr(M²).

    Args:
        vectors: [n, m]; mixed are their n places.
    """
    m, best = moment(vectors), (torch.eye(len(vectors), dtype=torch.float64), -1.0)
    for attempt in range(tries):
        noise = torch.randn(m.shape, generator=random, dtype=m.dtype) * (_NOISE / 2**0.5 if attempt else 0)
        start = m + noise + noise.t()
        p = _soft(start, 2)
        for step in range(_STEPS):
            gradient = m @ p @ m
            gradient = (gradient + gradient.t()) / (2 * gradient.std())
            p = _soft(gradient + (start if 2 * step < _STEPS else m), 1 + 2 * step / _STEPS)
        p = _hard(p)
        for _ in range(8):
            p = _hard(m @ p @ m)
        value = float((p @ m @ p.t() * m).sum() / m.square().sum())
        best = max(best, (p, value), key=lambda one: one[1])
        if value > SURE:
            break
    return best


def share_of_symmetry(p: Tensor, labels: Tensor) -> float:
    """How much of P is one of the mixing's own: places that it moves within their block, by the block's most common difference of labels.

    Args:
        labels: what entry of the outermost transform every place is, [n].
    """
    to, found, block = p.abs().argmax(1), 0, block_of(len(labels))
    for first in range(0, len(labels), block):
        mine = ((labels >= first) & (labels < first + block)).nonzero()[:, 0]
        inside = mine[labels[to[mine]] // block == first // block]
        found += int(torch.bincount(labels[inside] ^ labels[to[inside]]).max()) if len(inside) else 0
    return found / len(labels)


def labels_of(matrix: ExposedMatrix) -> tuple[Tensor, Tensor]:
    """Which entry of the outermost transform the rows [N] and the columns [K] of `coarse` are: columns pass S_3 after it, rows nothing."""
    return matrix.row_gather[0].long().sort().indices, matrix.column_gather[-1].long()


def two_rounds(rows: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The weakened system: 256 columns mixed in two rounds, with sizes right behind the outermost transform; and their labels."""
    mixing = Mixing.fresh(256, SecretStream(bytes(32), "two rounds"), COLUMNS)
    weak = Mixing(mixing.gather[:2], mixing.scale[:2])
    mixed = weak.undone_on_rows(torch.randn(rows, 256, generator=random, dtype=torch.float64).numpy())
    return torch.from_numpy(mixed).t(), weak.gather[-1].long()


@torch.no_grad()
def mixing_symmetry(subject: Subject) -> list[Attack]:
    """See the module."""
    if subject.scramble != "mixing":
        return []
    sides = list[tuple[Tensor, Tensor]]()
    for group in subject.groups:
        (n, k), (rows, columns) = group.exposed.shape, labels_of(group.matrix)
        if min(n, k) < _LEAST_VECTORS or min(n, k) > MOST_VECTORS or max(n, k) < 2 * min(n, k):
            continue
        sides.append((coarse(group.matrix), rows) if n < k else (coarse(group.matrix).t(), columns))
    sides = sorted(sides, key=lambda side: side[0].shape[0] / side[0].shape[1])[:MOST_SIDES]  # the longest first
    if not sides:
        return []
    random, shares, chances, surest = subject.random("symmetry"), list[float](), list[float](), -1.0
    for vectors, labels in sides:
        tries = next(count for most, count in _TRIES.items() if len(vectors) <= most)
        p, value = symmetry(vectors, random, tries)
        shares.append(share_of_symmetry(p, labels))
        chances += [share_of_symmetry(p, labels[torch.randperm(len(labels), generator=random)]) for _ in range(_SHUFFLES)]
        surest = max(surest, value)
    vectors, labels = two_rounds(2048, random)
    weak = share_of_symmetry(symmetry(vectors, random, _TRIES[256])[0], labels)
    value, chance, spread = sum(shares) / len(shares), sum(chances) / len(chances), float(torch.tensor(chances).std())
    verdict: Verdict = "broken" if surest > SURE else "holds" if value <= chance + 3 * spread / len(shares) ** 0.5 else "measured"
    metric = f"share of places moved as the outermost transform moves them, by a symmetry of the codes of {len(sides)} matrices"
    details, tries = {"highest_symmetry": surest, "highest_of_one_matrix": max(shares)}, sum(len(one) for one, _ in sides)
    interval = interval_of(value, tries)
    return [Attack("mixing_symmetry", subject.scheme, "A1", metric, value, chance, weak, tries, verdict, interval, details)]
