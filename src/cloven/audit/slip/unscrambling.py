"""Can the scramble be undone?

Adversary: A1, who holds all exposed matrices: every group's rows and columns are permuted and flipped by keys of its own.
Method: groups that read the residual stream have the same columns in different orders; who matches them has one basis for all. Columns
    are matched by their sorted magnitudes, and by the graph of their cosines (quadratic assignment), between groups and with the
    embeddings, given for free. What an MLP's first matrices make, its last one reads: their rows are matched with its columns, both ways.
    Groups of one kind in neighbouring layers are matched once 16 columns are known, by cosines with their signs.
    lm_head's rows and columns are matched with the embeddings', by soft permutations (Sinkhorn) and alternating directions.
Success: the share of places found, with an interval of 95 %. Chance: 1 / places.
Weakened: the same code where there is something to find: a second scramble of a near-duplicate (1 % noise) of the same matrix.
Source: matching obfuscated weights is published for permutation-based schemes; quadratic assignment by Vogelstein et al. 2015.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from cloven.audit.attack import Attack, interval_of, verdict_of
from cloven.audit.slip.matching import Known, aligned_to, by_graph, by_known, by_profiles
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.exposed_matrix import expose

MOST_PLACES = 4096  # rows or columns that are matched
MOST_PAIRS = 8
NOISE = 0.01
KNOWN = 16  # columns that an attacker is given
Matcher = Callable[[Tensor, Tensor], Tensor]


def residual_groups(subject: Subject) -> list[AttackedGroup]:
    """The groups whose input is the residual stream."""
    hidden = int(subject.plain.config.get_text_config().hidden_size)
    first = [group for group in subject.groups if group.codes.shape[1] == hidden]
    return [group for group in first if not group.parts[0][0].name.endswith(("o_proj", "c_proj", "dense"))]


def with_noise(matrix: Tensor) -> Tensor:
    """The matrix with 1 % noise, the same at every call."""
    noisy: Tensor = matrix * (1 + NOISE * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(7)))
    return noisy


def near_duplicate(matrix: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """A scramble of its own of the matrix with 1 % noise: (codes of its first term, their rows' places, its columns' places).

    Its key is no secret: an attacker made it.
    """
    made = expose(with_noise(matrix), terms, SecretStream(bytes(KEY_BYTES), "a near-duplicate"))
    order = made.row_gather[0].long().sort()
    return made.codes[order.values].float(), order.indices, made.column_gather.long()


def hits(match: Tensor, truth: Tensor, other: Tensor) -> float:
    """Share of the places i where truth[i] is other[match[i]]."""
    return float((truth == other[match]).double().mean())


def _between(subject: Subject, name: str, matcher: Matcher) -> list[Attack]:
    groups = [group for group in residual_groups(subject) if group.codes.shape[1] <= MOST_PLACES]
    pairs = list(itertools.pairwise(groups))[:MOST_PAIRS]
    if not pairs:
        return []
    shares = [hits(matcher(a.coarse()[0].t(), b.coarse()[0].t()), a.columns, b.columns) for a, b in pairs]
    value = sum(shares) / len(pairs)
    first = pairs[0][0]
    codes, _, columns = near_duplicate(first.exposed, first.terms)
    weak = hits(matcher(first.coarse()[0].t(), codes.t()), first.columns, columns)
    places = first.codes.shape[1]
    metric = f"share of columns matched between groups of one residual stream, {len(pairs)} pairs"
    chance, tries = 1 / places, places * len(pairs)
    return [_attack(subject, name, "A1", metric, value, chance, weak, tries)]


def _attack(subject: Subject, name: str, adversary: str, metric: str, value: float, chance: float, weak: float, tries: int) -> Attack:
    verdict, interval = verdict_of(value, chance, tries), interval_of(value, tries)
    return Attack(name, subject.scheme, adversary, metric, value, chance, weak, tries, verdict, interval)


def over_matrices(subject: Subject, name: str, adversary: str, metric: str, found: list[tuple[float, int]], weak: float) -> list[Attack]:
    """One attack from (share, places) of several matrices."""
    if not found:
        return []
    tries = sum(places for _, places in found)
    value = sum(share * places for share, places in found) / tries
    return [_attack(subject, name, adversary, metric, value, len(found) / tries, weak, tries)]


def _from_embeddings(subject: Subject) -> list[Attack]:
    table, attacks = embeddings(subject), list[Attack]()
    codes, rows, columns = near_duplicate(subject.plain.get_input_embeddings().weight.detach().float(), 1)
    places, adversary = table.shape[1], "A1, given the embeddings"
    groups = [group for group in residual_groups(subject) if group.codes.shape[1] <= MOST_PLACES][:MOST_PAIRS]
    metric = "share of columns of groups that read the residual stream matched with the embeddings' columns"
    for how, matcher in (("", by_profiles), ("_graph", by_graph)):
        found = [(hits(matcher(group.coarse()[0].t(), table.t()), group.columns, torch.arange(places)), places) for group in groups]
        weak = hits(matcher(codes.t(), table.t()), columns, torch.arange(places))
        attacks += over_matrices(subject, f"unscramble_columns_by_embeddings{how}", adversary, metric, found, weak)
    head = next((group for group in subject.groups if group.parts[0][0].out_features == len(table) and len(group.parts) == 1), None)
    if head is None or len(table) > MOST_PLACES:
        return attacks
    seen, truth = head.coarse()
    found = [(hits(aligned_to(seen, table).rows, truth, torch.arange(len(table))), len(table))]
    weak = hits(aligned_to(codes, table).rows, rows, torch.arange(len(table)))
    metric = "share of lm_head's rows matched with the embeddings' rows"
    return attacks + over_matrices(subject, "unscramble_lm_head_by_embeddings", adversary, metric, found, weak)


def embeddings(subject: Subject) -> Tensor:
    """The embeddings, equalised and quantised as what they are compared with: [V, h]."""
    return expose(subject.plain.get_input_embeddings().weight.detach().float(), 1, None).codes.float()


def _between_layers(subject: Subject) -> list[Attack]:
    """Rows of a matrix whose outputs are the next group's inputs, one by one, with that group's columns."""
    found, weak = list[tuple[float, int]](), 0.0
    for first, second in itertools.pairwise(subject.groups):
        places = second.codes.shape[1]
        if not _feeds(first, second) or places > MOST_PLACES or len(found) >= MOST_PAIRS:
            continue
        (seen, truth), columns = first.coarse(), second.coarse()[0].t()
        mine = truth < places  # the first member's rows: to tell members apart is a gift
        matches = [matcher(seen[mine], columns) for matcher in (by_profiles, by_graph)]
        found.append((max(hits(match, truth[mine], second.columns) for match in matches), places))
        if not weak:
            codes, rows, _ = near_duplicate(first.exposed[:places], first.terms)
            weak = hits(by_graph(seen[mine], codes), truth[mine], rows)
    metric = "share of the rows of an MLP's first matrix matched with the columns of its last one, the better of two matchers"
    return over_matrices(subject, "unscramble_rows_by_next_columns", "A1", metric, found, weak)


def _feeds(first: AttackedGroup, second: AttackedGroup) -> bool:
    parent = [group.parts[0][0].name.rpartition(".")[0] for group in (first, second)]
    return parent[0] == parent[1] and first.parts[0][0].out_features == second.codes.shape[1] != second.parts[0][0].out_features


def _from_known(subject: Subject) -> list[Attack]:
    """Between groups of one kind in neighbouring layers, once some columns are known."""
    groups, pairs = residual_groups(subject), list[tuple[AttackedGroup, AttackedGroup]]()
    for place, first in enumerate(groups):
        alike = [other for other in groups[place + 1 :] if other.codes.shape == first.codes.shape]
        pairs += [(first, alike[0])] if alike and max(first.codes.shape) <= MOST_PLACES else []
    found = []
    for a, b in pairs[:MOST_PAIRS]:
        truth = b.columns.argsort()[a.columns]
        share = _share_from_known(subject, a.coarse()[0], b.coarse()[0], truth, a.column_signs() * b.column_signs()[truth])
        found.append((share, len(truth) - KNOWN))
    if not found or found[0][1] < KNOWN:
        return []
    codes, coin = pairs[0][0].coarse()[0], subject.random("planted columns")
    order, signs = torch.randperm(codes.shape[1], generator=coin), 2.0 * torch.randint(0, 2, (codes.shape[1],), generator=coin) - 1
    planted = (with_noise(codes) * signs)[:, order]
    weak = _share_from_known(subject, codes, planted, order.argsort(), signs)
    metric = f"share of the other columns matched between groups of one kind in neighbouring layers, {len(found)} pairs"
    adversary = f"A1, who knows {KNOWN} of {codes.shape[1]} columns"
    return over_matrices(subject, "unscramble_columns_from_known", adversary, metric, found, weak)


def _share_from_known(subject: Subject, a: Tensor, b: Tensor, truth: Tensor, signs: Tensor) -> float:
    """The share of the other columns matched: column i of a [N, K] is column truth[i] of b [M, K], up to signs[i]."""
    given = torch.randperm(len(truth), generator=subject.random("known columns"))
    match = by_known(a.t(), b.t(), Known(given[:KNOWN], truth[given[:KNOWN]], signs[given[:KNOWN]]))
    return float((match == truth)[given[KNOWN:]].double().mean())


@torch.no_grad()
def unscrambling(subject: Subject) -> list[Attack]:
    """See the module."""
    if not subject.scrambled:
        return []
    return [
        *_between(subject, "unscramble_columns_by_magnitudes", by_profiles),
        *_between(subject, "unscramble_columns_by_graph", by_graph),
        *_from_embeddings(subject),
        *_between_layers(subject),
        *_from_known(subject),
    ]
