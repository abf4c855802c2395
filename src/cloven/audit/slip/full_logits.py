"""What do full logits give away of the head?

Adversary: A8, an API user in league with the worker: sees full logits for prompts of its choice, and holds the exposed lm_head.
Method: the logits span lm_head's columns: an SVD gives W M, M an unknown basis; no split prevents that. Does it align the scramble?
    The exposed matrix is D P W' M' with secret row scales, places and signs, and W' = W less its secret part. Tyler's estimator brings
    both into one basis up to a rotation, whatever D, M and M' are; rows are then matched by the graph of their cosines. Where rows are
    mixed there is no token for a row: of all rotations the least one that turns the one span into the other is taken. The same matrices
    under permutations alone are attacked beside it.
Success: the share of lm_head's columns that the logits span, and the share of its rows whose token, or whose combination of tokens (mean
    squared cosine), is found. Chance: columns / vocabulary; 1 / vocabulary.
Weakened: the true columns; the exposed matrix of the whole W, nothing secret taken out, under permutations; rows mixed by a rotation that
    is small.
Source: that logits give the head is published (arXiv 2403.06634); the alignment is ours; the least rotation is Davis and Kahan's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack, interval_of, verdict_of
from cloven.audit.slip.matching import by_graph, spread_evenly
from cloven.audit.slip.scrambled import share_of
from cloven.audit.slip.subject import AttackedGroup, Subject, compared
from cloven.audit.slip.unscrambling import MOST_PLACES, planted

MOST_ROTATED = 2048  # tokens: a rotation is a matrix of its square
_SMALL = 0.2  # of the control's rotation
_ADVERSARY = "A8, who sees full logits and holds the exposed half"


def head_from_logits(subject: Subject, rank: int) -> Tensor:
    """W M [V, h] from logits of random prompts: the top right singular vectors."""
    random, rows = subject.random("logits"), list[Tensor]()
    vocabulary = int(subject.plain.config.get_text_config().vocab_size)
    while sum(len(part) for part in rows) < 2 * rank:
        ids = torch.randint(vocabulary, (1, 128), generator=random)
        rows.append(subject.plain(input_ids=ids, use_cache=False).logits[0].float())
    _, s, vt = torch.linalg.svd(torch.cat(rows).double(), full_matrices=False)
    head: Tensor = vt[:rank].t() * s[:rank]
    return head


def least_rotation(source: Tensor, target: Tensor) -> Tensor:
    """Of all rotations that take the span of the source's columns [n, h] to the target's the nearest to none: float64 [n, n]."""
    (a, _), (b, _) = torch.linalg.qr(source.double()), torch.linalg.qr(target.double())
    p, q, one = a @ a.t(), b @ b.t(), torch.eye(len(a), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(q @ p + (one - q) @ (one - p))
    rotation: Tensor = u @ vt
    return rotation


@torch.no_grad()
def full_logits(subject: Subject) -> list[Attack]:
    """See the module."""
    vocabulary = int(subject.plain.config.get_text_config().vocab_size)
    found = [_attack(one, head, vocabulary) for one in compared(subject) if (head := _head(one, vocabulary)) is not None]
    head = _head(subject, vocabulary)
    return [*([_span(subject, head, vocabulary)] if head is not None else []), *(attack for attack in found if attack is not None)]


def _head(subject: Subject, vocabulary: int) -> AttackedGroup | None:
    return next((one for one in subject.groups if one.parts[0][0].out_features == vocabulary and len(one.parts) == 1), None)


def _span(subject: Subject, head: AttackedGroup, vocabulary: int) -> Attack:
    """What needs no worker."""
    w = head.weight(0).double()
    basis = torch.linalg.qr(head_from_logits(subject, w.shape[1]))[0]
    value = float((basis.t() @ w).square().sum() / w.square().sum())
    chance = min(1.0, w.shape[1] / vocabulary)
    metric = "share of lm_head's columns that full logits span: they give lm_head, up to a basis, with any split"
    return Attack(
        "full_logits_span", subject.scheme, _ADVERSARY, metric, value, chance, 1.0, vocabulary, verdict_of(value, chance, vocabulary)
    )


def _attack(subject: Subject, head: AttackedGroup, vocabulary: int) -> Attack | None:
    mixed = subject.scramble == "mixing"
    if vocabulary > (MOST_ROTATED if mixed else MOST_PLACES):
        return None
    known, random = head_from_logits(subject, head.codes.shape[1]), subject.random("full logits")
    if mixed:
        near = torch.eye(vocabulary, dtype=torch.float64)
        near = torch.linalg.qr(near + _SMALL / vocabulary**0.5 * torch.randn(near.shape, generator=random, dtype=near.dtype))[0]
        near = near * near.diag().sign()  # QR's choice of signs
        each = torch.arange(vocabulary)
        value = share_of(each, least_rotation(known, head.seen.codes).float(), head.seen.rows)
        weak = share_of(each, least_rotation(known, near @ head.exposed.double()), near)
        metric = "share of the combinations of tokens that lm_head's mixed rows are, found from full logits"
    else:
        even = spread_evenly(known)
        value, weak = (
            share_of(by_graph(spread_evenly(seen.codes), even), seen.rows, torch.eye(vocabulary))
            for seen in (head.seen, planted(head.weight(0), head.terms, mixed=False)[1])
        )
        metric = "share of lm_head's rows whose token is found from full logits"
    chance = 1 / vocabulary
    verdict, interval = verdict_of(value, chance, vocabulary), interval_of(value, vocabulary)
    return Attack("full_logits", subject.scheme, _ADVERSARY, metric, value, chance, weak, vocabulary, verdict, interval)
