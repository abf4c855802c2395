"""Does the exposed half show where the secret was?

Adversary: A1, the curious worker, in its best case: it knows the rank k of every matrix, the scramble and all scales. And once as it
    is: it has the codes of a group as they lie.
Method: removing the top k singular triples leaves U_k and V_k as the directions in which nothing is left. Take the SVD of the exposed
    matrix, choose vectors that stand out (at the bottom of the spectrum, where a hole would be; at the top, where the secret was; by
    singular values that nearly coincide, as copied ones would; by peaked entries), and see how much of U_k and V_k they span. With the
    bundle's precision, and on a new split of the same matrices with the other one, which is in no headline.
    Of a model whose secret is its difference from a public base, E less the base is attacked, where the base is named as a relative.
Success: ‖Xᵀ U_k‖² / k above the share of all vectors that were chosen, which is chance; on the side that shows more, left or right.
    Averaged over matrices, weighted by k.
Weakened: a split in which each of them succeeds: without the decoy (bottom), with copied singular values in the hole (pairs), with
    nothing taken out (top, peaked); scrambled too where the attacked one is.
Source: the attack on published SVD splits is ours; so is the decoy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.slip.scrambled import Scrambled, sizes_of
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.field.prg import SecretStream
from cloven.slip.decomposition import spectrum, split
from cloven.slip.exposed_matrix import ExposedMatrix, expose

MOST_MATRICES = 12  # those with most secret directions
MOST_ENTRIES = 2**24  # of a matrix whose exact SVD is computed
MOST_SIDE = 8192  # of a scrambled one, whose rotations are square matrices


@dataclass(frozen=True, repr=False)
class View:
    """What an attacker computes from one exposed matrix, and what it looks for: the secret directions, and the hole that they leave."""

    k: int
    values: Tensor
    left: Tensor
    right: Tensor
    secret: tuple[Tensor, Tensor]
    hole: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, exposed: Tensor, left: Tensor, right: Tensor) -> View:
        """Of E [N, K], and orthonormal bases [N, k] and [K, k] of the secret directions."""
        u, s, vt = torch.linalg.svd(exposed.double(), full_matrices=False)
        return cls(right.shape[1], s, u, vt.t(), (left, right), (left, right))

    @classmethod
    def as_it_lies(cls, made: ExposedMatrix, group: AttackedGroup) -> View:
        """Of a group's first int8 term, scrambled and without scales: E = diag(n) F diag(c), F in rotated coordinates.

        What was taken out of E is diag(n)^-1 U and diag(c)^-1 V there, and the hole that it leaves diag(n) U and diag(c) V.
        """
        seen, (n, c) = Scrambled.of(made), sizes_of(made)
        lefts, rights = zip(*(secret_directions(group, part) for part in range(len(group.parts))), strict=True)
        sides = (seen.rows.double(), torch.block_diag(*lefts), n.double()), (seen.columns.double(), torch.cat(rights, 1), c.double())
        # a hole is met by what the codes are multiplied with, R and C; what was taken out by R⁻¹ and C⁻ᵀ
        secret, hole = (
            tuple(torch.linalg.qr((turn if power < 0 else torch.linalg.inv(turn).t()) @ (basis * size[:, None] ** power))[0]
                  for turn, basis, size in sides)
            for power in (-1, 1)
        )  # fmt: skip
        view = cls.of(seen.codes, *secret)
        return replace(view, hole=(hole[0], hole[1]))


def secret_directions(group: AttackedGroup, part: int) -> tuple[Tensor, Tensor]:
    """U_k [N, k] and V_k [K, k] of one member of a private model, float64. A's rows are V_kᵀ; B is more than U_k, by the decoy."""
    k = _rank(group, part)
    return torch.linalg.svd(group.weight(part).double(), full_matrices=False)[0][:, :k], _rows(group, part)


def _rows(group: AttackedGroup, part: int) -> Tensor:
    rows: Tensor = torch.linalg.qr(group.parts[part][0].secret_a.double().t())[0]
    return rows


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
        vectors = (view.left, view.right)[number]
        secret, chosen = (view.hole if choose is bottom else view.secret)[number], choose(view, vectors)
        found += float((vectors[:, chosen].t() @ secret).square().sum())
        chance += view.k * len(chosen) / len(view.values)
    total = sum(view.k for view in views)
    return found / total, chance / total


def share(views: list[View], choose: Callable[[View, Tensor], Tensor]) -> tuple[float, float]:
    """The same on the side that shows more."""
    return max((side(views, choose, number) for number in (0, 1)), key=lambda both: both[0] - both[1])


def _tries(views: list[View], *, exact: bool) -> int:
    """What a share's noise is like: in E itself a decoy's directions are singular vectors, each in some place of the spectrum; with other
    scales they are anywhere, and random subspaces of n dimensions share k m / n with a binomial's variance over k n / 2 tries."""
    return sum(view.k if exact else view.k * len(view.values) // 2 for view in views)


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
    if subject.origin != "private":
        return _against_the_base(subject, chosen) if subject.relative is not None else []
    terms, stream = chosen[0][0].terms, subject.stream("null space")
    best_case = "A1, who knows the scramble and all scales" if subject.scrambled else "A1, given all scales"
    real = [View.of(group.exposed[group.parts[part][1]], *secret_directions(group, part)) for group, part in chosen]
    found = _attacks(subject, "", best_case, real, _controls(chosen, terms, stream))
    other, precision = (2, "int8x2") if terms == 1 else (1, "int8")
    again = _views(chosen, lambda weight, k: split(weight, k, spectrum(weight), stream).exposed, other)
    elsewhere = _attacks(subject, f"_{precision}", best_case, again, _controls(chosen, other, stream))
    groups = [
        group
        for group in dict.fromkeys(group for group, _ in chosen)
        if group.exposed.numel() <= MOST_ENTRIES and max(group.exposed.shape) <= MOST_SIDE
    ]
    if subject.scrambled and groups:
        lying = [View.as_it_lies(group.matrix, group) for group in groups]
        mixed = subject.scramble == "mixing"
        found += _attacks(subject, "_scrambled", "A1", lying, _controls_as_they_lie(groups, terms, stream, mixed))
        again = _as_they_lie(groups, lambda weight, k: split(weight, k, spectrum(weight), stream).exposed, other, stream, mixed)
        elsewhere += _attacks(subject, f"_{precision}_scrambled", "A1", again, _controls_as_they_lie(groups, other, stream, mixed))
    return [*found, *(replace(attack, scheme=f"slip/{precision}, another split") for attack in elsewhere)]


def _attacks(subject: Subject, which: str, adversary: str, real: list[View], weakened: dict[str, list[View]]) -> list[Attack]:
    total, lying, found = sum(view.k for view in real), which.endswith("_scrambled"), []
    metric = f"share of the {total} secret directions of {len(real)} matrices that the chosen singular vectors of the exposed half span"
    for choose in (choose for choose in CHOOSERS if choose.__name__ in weakened):
        (left, _), (right, _) = side(real, choose, 0), side(real, choose, 1)
        value, chance = share(real, choose)
        name, verdict, details = (
            f"null_space_{choose.__name__}{which}",
            verdict_of(value, chance, _tries(real, exact=not lying)),
            {"left": left, "right": right},
        )
        weak = share(weakened[choose.__name__], choose)[0]
        found.append(Attack(name, subject.scheme, adversary, metric, value, chance, weak, total, verdict, details=details))
    return found


def _against_the_base(subject: Subject, chosen: list[tuple[AttackedGroup, int]]) -> list[Attack]:
    """The secret is the top of W − W_base: the bottom of E − W_base. There is no decoy in this mode; the relative is taken for the base."""
    views, weakened = [], []
    for group, part in chosen:
        member, rows = group.parts[part]
        left, right = torch.linalg.qr(member.secret_b.double())[0], _rows(group, part)
        base = subject.relative_weight(member).double()
        views.append(View.of(group.exposed[rows].double() - base, left, right))
        weakened.append(View.of(without_top(group.weight(part).double() - base, _rank(group, part)), left, right))
    value, chance = share(views, bottom)
    total = sum(view.k for view in views)
    metric = f"share of the {total} secret directions of {len(views)} matrices at the bottom of the spectrum of exposed half less base"
    verdict, weak = verdict_of(value, chance, total), share(weakened, bottom)[0]
    adversary = "A1, who has a public relative: the base"
    return [Attack("null_space_against_the_base", subject.scheme, adversary, metric, value, chance, weak, total, verdict)]


def _rank(group: AttackedGroup, part: int) -> int:
    return int(group.parts[part][0].secret_a.shape[0])


def _views(chosen: list[tuple[AttackedGroup, int]], made: Callable[[Tensor, int], Tensor], terms: int) -> list[View]:
    """Views of `made(W, k)`, quantised like an exposed matrix."""
    return [
        View.of(expose(made(group.weight(part), _rank(group, part)), terms, None).dequantised(), *secret_directions(group, part))
        for group, part in chosen
    ]


def _controls(chosen: list[tuple[AttackedGroup, int]], terms: int, stream: SecretStream) -> dict[str, list[View]]:
    """For every chooser a split in which it must succeed."""
    nothing_taken = _views(chosen, lambda weight, k: weight, terms)
    copied = _views(chosen, lambda weight, k: _copied(weight, k, stream), terms)
    return {"bottom": _views(chosen, without_top, terms), "top": nothing_taken, "closest_pairs": copied, "peaked": nothing_taken}


def _as_they_lie(
    groups: list[AttackedGroup], made: Callable[[Tensor, int], Tensor], terms: int, stream: SecretStream, mixed: bool
) -> list[View]:
    """Views of whole groups of `made(W, k)`, scrambled anew."""
    stacks = [torch.cat([made(group.weight(part), _rank(group, part)) for part in range(len(group.parts))]) for group in groups]
    return [View.as_it_lies(expose(stack, terms, stream, mixed=mixed), group) for stack, group in zip(stacks, groups, strict=True)]


def _controls_as_they_lie(groups: list[AttackedGroup], terms: int, stream: SecretStream, mixed: bool) -> dict[str, list[View]]:
    def views(made: Callable[[Tensor, int], Tensor]) -> list[View]:
        return _as_they_lie(groups, made, terms, stream, mixed)

    nothing_taken = views(lambda weight, k: weight)
    # scales part the pairs, and where everything is mixed no vector is peaked: nothing to see
    return {"bottom": views(without_top), "top": nothing_taken} | ({} if mixed else {"peaked": nothing_taken})


def hollow(weight: Tensor, k: int, terms: int) -> Tensor:
    """The same, quantised like an exposed matrix."""
    return expose(without_top(weight, k), terms, None).dequantised()


def without_top(weight: Tensor, k: int) -> Tensor:
    """R = W − U_k Σ_k V_kᵀ, float64."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    rest: Tensor = weight.double() - (u[:, :k] * s[:k]) @ vt[:k]
    return rest


def _copied(weight: Tensor, k: int, stream: SecretStream) -> Tensor:
    """R with copies of kept singular values in the hole: each of them is twice in the spectrum then."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    copies = s[k:][(torch.from_numpy(stream.uniform(k)) * (len(s) - k)).long()] if k else s[:0]
    filled: Tensor = without_top(weight, k) + u[:, :k] @ (copies[:, None] * stream.orthogonal(k)) @ vt[:k] if k else weight.double()
    return filled
