"""Can the scramble be undone?

Adversary: A1, who holds all exposed matrices: every group's rows and columns are permuted and flipped by keys of its own.
Method: groups that read the residual stream have the same columns in different orders; who matches them has one basis for all. Columns
    are matched by their sorted magnitudes, and by the graph of their cosines (quadratic assignment); columns and lm_head's rows against
    the embeddings, given for free, likewise; and rows and columns against a public relative, where the user has named one.
Success: the share of places found. Chance: 1 / places.
Weakened: the same code where there is something to find: a second scramble of a near-duplicate (1 % noise) of the same matrix.
Source: matching obfuscated weights is published for permutation-based schemes; quadratic assignment by Vogelstein et al. 2015.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.slip.matching import by_graph, by_profiles
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.exposed_matrix import expose

MOST_PLACES = 4096  # rows or columns that are matched
MOST_PAIRS = 8
NOISE = 0.01
Matcher = Callable[[Tensor, Tensor], Tensor]


def residual_groups(subject: Subject) -> list[AttackedGroup]:
    """The groups whose input is the residual stream."""
    hidden = int(subject.plain.config.get_text_config().hidden_size)
    first = [group for group in subject.groups if group.codes.shape[1] == hidden]
    return [group for group in first if not group.parts[0][0].name.endswith(("o_proj", "c_proj", "dense"))]


def near_duplicate(matrix: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """A scramble of its own of the matrix with 1 % noise: (codes of its first term, their rows' places, its columns' places)."""
    noisy = matrix * (1 + NOISE * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(7)))
    made = expose(noisy, terms, SecretStream(secrets.token_bytes(KEY_BYTES), "audit"))
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
    return [Attack(name, subject.scheme, "A1", metric, value, chance, weak, tries, verdict_of(value, chance, tries))]


def _against(subject: Subject, name: str, adversary: str, metric: str, found: list[tuple[float, int]], weak: float) -> list[Attack]:
    """One attack from (share, places) of several matrices."""
    if not found:
        return []
    tries = sum(places for _, places in found)
    value = sum(share * places for share, places in found) / tries
    chance = len(found) / tries
    return [Attack(name, subject.scheme, adversary, metric, value, chance, weak, tries, verdict_of(value, chance, tries))]


def _from_embeddings(subject: Subject) -> list[Attack]:
    embeddings = subject.plain.get_input_embeddings().weight.detach().float()
    table = expose(embeddings, 1, None).codes.float()  # equalised and quantised as what it is compared with
    groups = [group for group in residual_groups(subject) if group.codes.shape[1] <= MOST_PLACES]
    metric = "share of columns of groups that read the residual stream matched with the embeddings' columns"
    found = [
        (hits(by_profiles(group.coarse()[0].t(), table.t()), group.columns, torch.arange(table.shape[1])), table.shape[1])
        for group in groups[:MOST_PAIRS]
    ]
    codes, rows, columns = near_duplicate(embeddings, 1)
    weak = hits(by_profiles(codes.t(), table.t()), columns, torch.arange(table.shape[1]))
    attacks = _against(subject, "unscramble_columns_by_embeddings", "A1, given the embeddings", metric, found, weak)
    head = next((group for group in subject.groups if group.parts[0][0].out_features == len(table) and len(group.parts) == 1), None)
    if head is None or len(table) > MOST_PLACES:
        return attacks
    metric = "share of lm_head's rows matched with the embeddings' rows"
    seen, truth = head.coarse()
    found = [(hits(by_profiles(seen, table), truth, torch.arange(len(table))), len(table))]
    weak = hits(by_profiles(codes, table), rows, torch.arange(len(table)))
    return attacks + _against(subject, "unscramble_lm_head_by_embeddings", "A1, given the embeddings", metric, found, weak)


def _with_relative(subject: Subject) -> list[Attack]:
    if subject.relative is None:
        return []
    found_rows, found_columns = [], []
    for group in subject.groups:
        if max(group.exposed.shape) > MOST_PLACES:
            continue
        public = torch.cat([_without_top(subject.relative_weight(member), member.secret_a.shape[0]) for member, _ in group.parts])
        reference = expose(public, 1, None).codes.float()
        seen, rows = group.coarse()
        found_rows.append((hits(by_profiles(seen, reference), rows, torch.arange(len(reference))), len(reference)))
        match = by_profiles(seen.t(), reference.t())
        found_columns.append((hits(match, group.columns, torch.arange(len(match))), len(match)))
    adversary, weak = "A1, who has a public relative", _planted(subject)
    return _against(
        subject, "unscramble_rows_by_relative", adversary, "share of rows matched with the relative's", found_rows, weak
    ) + _against(subject, "unscramble_columns_by_relative", adversary, "share of columns matched with the relative's", found_columns, weak)


def _planted(subject: Subject) -> float:
    group = next(one for one in subject.groups if max(one.exposed.shape) <= MOST_PLACES)
    codes, rows, _ = near_duplicate(group.exposed, group.terms)
    seen, truth = group.coarse()
    return hits(by_profiles(seen, codes), truth, rows)


def _without_top(weight: Tensor, k: int) -> Tensor:
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    rest: Tensor = weight - (u[:, :k] * s[:k]) @ vt[:k]
    return rest


@torch.no_grad()
def unscrambling(subject: Subject) -> list[Attack]:
    """See the module."""
    if not subject.scrambled:
        return []
    return [
        *_between(subject, "unscramble_columns_by_magnitudes", by_profiles),
        *_between(subject, "unscramble_columns_by_graph", by_graph),
        *_from_embeddings(subject),
        *_with_relative(subject),
    ]
