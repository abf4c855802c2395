"""Can the scramble be undone?

Adversary: A1, who holds all exposed matrices: every group's rows and columns are hidden by keys of its own.
Method: matrices that read the residual stream have its basis on their columns, those that write it on their rows; who brings them into
    one basis has undone half of the scramble. Each is compared with the next that reads, the next of its kind, and the next that reads
    what it wrote; and with the embeddings, given for free: by sorted magnitudes, by the graph of cosines (quadratic assignment), and
    by the eigenvectors of their Gram matrices, in the order of their eigenvalues. What an MLP's first matrices make, its last one
    reads: their rows are matched with its columns. lm_head's rows are matched with the embeddings' by soft permutations (Sinkhorn) and
    alternating directions. The bundle's own scramble, and beside it permutations and signs alone. Where the scramble mixes there are no
    places: only eigenvectors are compared.
Success: the share of the basis that is found: the mean squared cosine of what was named and what is right; of places, where the scramble
    permutes. Chance: 1 / dimension. "Broken" if half of the basis of any one pair is found.
Weakened: the same code where there is something to find: a near-duplicate (1 % noise) of the same matrix, under keys of its own; for what
    matches places, both under permutations alone; for eigenvectors under rotations, with signs in the place of secret sizes, unrounded.
Source: matching obfuscated weights is published for permutation-based schemes; quadratic assignment by Vogelstein et al. 2015.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from cloven.audit.attack import Attack, interval_of, verdict_of
from cloven.audit.slip.matching import aligned_to, by_eigenvectors, by_graph, by_profiles
from cloven.audit.slip.scrambled import Scrambled, columns_of, in_the_model, rows_of, share_of, sizes_of
from cloven.audit.slip.subject import AttackedGroup, Subject, compared
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.exposed_matrix import expose

MOST_PLACES = 4096  # rows or columns that are matched
MOST_PAIRS = 8  # of a kind
_TOP = 16
NOISE = 0.01
_WRITERS = ("o_proj", "c_proj", "dense", "out_proj", "down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2")
Matcher = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, repr=False, eq=False)
class Side:
    """A matrix with the basis that is looked for on its columns: float32 [n, h]; and what these are, [h, h]."""

    name: str
    matrix: Tensor
    basis: Tensor
    group: AttackedGroup | None = None

    @functools.cached_property
    def eigenvectors(self) -> Tensor:
        """Of the columns' Gram matrix, in the order of eigenvalues and in the model's coordinates: [h, h]."""
        return in_the_model(self.basis, by_eigenvectors(self.matrix))


def columns_side(seen: Scrambled) -> Side:
    """The columns of a scrambled matrix."""
    return Side("", seen.codes, seen.columns)


def residual_sides(subject: Subject) -> list[Side]:
    """What reads or writes the residual stream, in the model's order."""
    hidden, sides = int(subject.plain.config.get_text_config().hidden_size), list[Side]()
    for group in subject.groups:
        n, k = group.exposed.shape
        writes = len(group.parts) == 1 and group.parts[0][0].name.endswith(_WRITERS)
        if max(n, k) > MOST_PLACES or (n if writes else k) != hidden:
            continue
        seen = group.seen
        matrix, basis = (seen.codes.t(), seen.rows) if writes else (seen.codes, seen.columns)
        sides.append(Side(group.name, matrix, basis, group))
    return sides


def writes(side: Side) -> bool:
    """Whether it is a matrix that writes the residual stream: its rows have the basis."""
    return side.name.endswith(_WRITERS)


def pairs_of(sides: list[Side]) -> list[tuple[Side, Side]]:
    """Neighbours that read, neighbours of one kind, and what writes with what reads next."""

    readers = [side for side in sides if not writes(side)]
    kinds = [[side for side in sides if side.name.rpartition(".")[2] == kind] for kind in {s.name.rpartition(".")[2] for s in sides}]
    alike = sorted((pair for kind in kinds for pair in itertools.pairwise(kind)), key=lambda pair: sides.index(pair[0]))
    onwards = [pair for pair in itertools.pairwise(sides) if writes(pair[0]) and not writes(pair[1])]
    chosen = [*list(itertools.pairwise(readers))[:MOST_PAIRS], *alike[:MOST_PAIRS], *onwards[:MOST_PAIRS]]
    return list({(a.name, b.name): (a, b) for a, b in chosen}.values())


def with_noise(matrix: Tensor) -> Tensor:
    """The matrix with 1 % noise, the same at every call."""
    noisy: Tensor = matrix * (1 + NOISE * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(7)))
    return noisy


def planted(matrix: Tensor, terms: int, *, mixed: bool) -> tuple[Scrambled, Scrambled]:
    """A matrix [N, K] and its near-duplicate under scrambles of their own. The keys are no secrets: an attacker made them.

    Where they are mixed, it is by rotations, without sizes, and nothing is rounded.
    """
    made = []
    for one, key in ((matrix, "the matrix"), (with_noise(matrix), "a near-duplicate")):
        exposed = expose(one, terms, SecretStream(bytes(KEY_BYTES), key), mixed=mixed)
        if not mixed:
            made.append(Scrambled.of(exposed))
            continue
        (n, c), rows, columns = sizes_of(exposed), rows_of(exposed, sizes=False), columns_of(exposed, sizes=False)
        made.append(Scrambled(rows @ (one.float() / n[:, None] / c) @ columns.t(), rows, columns))
    return made[0], made[1]


def between(matcher: Matcher, a: Side, b: Side) -> float:
    """The share of the basis that a matcher of columns finds."""
    return share_of(matcher(a.matrix.t(), b.matrix.t()), a.basis, b.basis)


def by_spectra(a: Side, b: Side) -> float:
    """The same for eigenvectors, in the order of eigenvalues."""
    return float((a.eigenvectors * b.eigenvectors).sum(0).square().mean())


def shared_top(a: Side, b: Side) -> float:
    """How much of the span of one's 16 top eigenvectors is in the other's: more than single ones show, and less than a basis."""
    first, second = (torch.linalg.qr(one.eigenvectors[:, -_TOP:])[0] for one in (a, b))
    return float((first.t() @ second).square().sum() / first.shape[1])


def over_matrices(
    subject: Subject,
    name: str,
    adversary: str,
    metric: str,
    found: list[tuple[float, int]],
    weak: float,
    more: Mapping[str, float] = MappingProxyType({}),
) -> list[Attack]:
    """One attack from (share, dimension) of several pairs; "broken" if one of them is. `more` goes to the details."""
    if not found:
        return []
    tries = sum(places for _, places in found)
    value, highest = sum(share * places for share, places in found) / tries, max(found)
    broken = any(verdict_of(share, 1 / places, places) == "broken" for share, places in found)
    verdict, interval = "broken" if broken else verdict_of(value, len(found) / tries, tries), interval_of(value, tries)
    details = {"highest_of_one_pair": highest[0], **more}
    return [Attack(name, subject.scheme, adversary, metric, value, len(found) / tries, weak, tries, verdict, interval, details)]


def _columns(subject: Subject) -> list[Attack]:
    sides = residual_sides(subject)
    group = next((side.group for side in sides if side.group is not None), None)
    if group is None or len(sides) < 2:
        return []
    table, pairs, chosen = embeddings(subject), pairs_of(sides), sides[: 2 * MOST_PAIRS]
    given = Side("embeddings", table, torch.eye(table.shape[1]))
    apart, rotated = ([columns_side(seen) for seen in planted(group.exposed, group.terms, mixed=one)] for one in (False, True))
    comparisons: dict[str, tuple[Callable[[Side, Side], float], list[Side]]] = {"eigenvectors": (by_spectra, rotated)}
    if subject.scramble == "permutation":  # else there are no places to be matched
        comparisons |= {
            "magnitudes": (functools.partial(between, by_profiles), apart),
            "graph": (functools.partial(between, by_graph), apart),
        }
    attacks = []
    for how, (compare, control) in comparisons.items():
        weak, top = compare(*control), dict[str, float]()
        if how == "eigenvectors":
            top = {"highest_share_of_the_16_top_directions": max(shared_top(a, b) for a, b in pairs)}
            top["chance_of_that"] = _TOP / len(pairs[0][0].basis)
        found = [(compare(a, b), len(a.basis)) for a, b in pairs]
        metric = f"share of the residual stream's basis found between matrices that read or write it, {len(pairs)} pairs"
        attacks += over_matrices(subject, f"unscramble_columns_by_{how}", "A1", metric, found, weak, top)
        found = [(compare(side, given), len(side.basis)) for side in chosen]
        metric = f"share of the residual stream's basis found by comparing {len(chosen)} matrices with the embeddings"
        attacks += over_matrices(subject, f"unscramble_columns_by_embeddings_{how}", "A1, given the embeddings", metric, found, weak)
    return attacks


def embeddings(subject: Subject) -> Tensor:
    """The embeddings, equalised and quantised as what they are compared with: [V, h]."""
    return expose(subject.plain.get_input_embeddings().weight.detach().float(), 1, None).codes.float()


def _head(subject: Subject) -> list[Attack]:
    """lm_head's rows and the embeddings'."""
    table = embeddings(subject)
    head = next((group for group in subject.groups if group.parts[0][0].out_features == len(table) and len(group.parts) == 1), None)
    if head is None or len(table) > MOST_PLACES:
        return []
    seen = head.seen
    found = [(share_of(aligned_to(seen.codes, table).rows, seen.rows, torch.eye(len(table))), len(table))]
    first, near = planted(subject.plain.get_input_embeddings().weight.detach().float(), 1, mixed=False)
    weak = share_of(aligned_to(near.codes, first.codes).rows, near.rows, first.rows)
    metric = "share of lm_head's rows matched with the embeddings' rows"
    return over_matrices(subject, "unscramble_lm_head_by_embeddings", "A1, given the embeddings", metric, found, weak)


def _between_layers(subject: Subject) -> list[Attack]:
    """Rows of a matrix whose outputs are the next group's inputs, one by one, with that group's columns."""
    found, weak = {matcher: list[tuple[float, int]]() for matcher in (by_profiles, by_graph)}, dict[Matcher, float]()
    for first, second in itertools.pairwise(subject.groups):
        places = second.codes.shape[1]
        if not _feeds(first, second) or max(first.exposed.shape) > MOST_PLACES or len(found[by_graph]) >= MOST_PAIRS:
            continue
        a, b = first.seen, second.seen
        mine = a.rows[:, :places].square().sum(1) > 0.5  # the first member's rows: to tell members apart is a gift
        one, near = planted(first.exposed[:places], first.terms, mixed=False)
        for matcher, shares in found.items():
            shares.append((share_of(matcher(a.codes[mine], b.codes.t()), a.rows[mine][:, :places], b.columns), places))
            weak.setdefault(matcher, share_of(matcher(one.codes, near.codes), one.rows, near.rows))
    metric = "share of the rows of an MLP's first matrix matched with the columns of its last one"
    attacks = []
    for matcher, shares in found.items():
        name = f"unscramble_rows_by_next_columns_{'graph' if matcher is by_graph else 'magnitudes'}"
        attacks += over_matrices(subject, name, "A1", metric, shares, weak.get(matcher, 0.0))
    return attacks


def _feeds(first: AttackedGroup, second: AttackedGroup) -> bool:
    parent = [group.parts[0][0].name.rpartition(".")[0] for group in (first, second)]
    return parent[0] == parent[1] and first.parts[0][0].out_features == second.codes.shape[1] != second.parts[0][0].out_features


@torch.no_grad()
def unscrambling(subject: Subject) -> list[Attack]:
    """See the module."""
    # mixed rows are of no one place: there is none to be matched
    return [
        attack
        for one in compared(subject)
        for attack in (*_columns(one), *((*_head(one), *_between_layers(one)) if one.scramble == "permutation" else ()))
    ]
