"""What do full logits give away of the head?

Adversary: A8, an API user in league with the worker: sees full logits for prompts of its choice, and holds the exposed lm_head.
Method: the logits span lm_head's columns: an SVD gives W M, M an unknown basis. The exposed matrix is D P W' M' with secret row scales,
    places and signs, and W' = W less its secret part. Tyler's estimator brings both into one basis up to a rotation, whatever D, M and
    M' are; rows are then matched by the graph of their cosines.
Success: the share of lm_head's rows whose token is found. Chance: 1 / vocabulary.
    Where the bundle's scramble mixes there are no such rows: then the same matrices under permutations alone are attacked.
Weakened: the same with the exposed matrix of the whole W, nothing secret taken out, under permutations.
Source: that logits give the head is published (arXiv 2403.06634); the alignment is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack, interval_of, verdict_of
from cloven.audit.slip.matching import by_graph, spread_evenly
from cloven.audit.slip.scrambled import Scrambled, share_of
from cloven.audit.slip.subject import Subject, compared
from cloven.audit.slip.unscrambling import MOST_PLACES, planted


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


@torch.no_grad()
def full_logits(subject: Subject) -> list[Attack]:
    """See the module."""
    return [attack for one in compared(subject) if one.scramble == "permutation" for attack in _attack(one)]


def _attack(subject: Subject) -> list[Attack]:
    vocabulary = int(subject.plain.config.get_text_config().vocab_size)
    head = next((one for one in subject.groups if one.parts[0][0].out_features == vocabulary and len(one.parts) == 1), None)
    if head is None or vocabulary > MOST_PLACES:
        return []
    known = spread_evenly(head_from_logits(subject, head.codes.shape[1]))
    tokens = torch.eye(vocabulary)

    def share(seen: Scrambled) -> float:
        return share_of(by_graph(spread_evenly(seen.codes), known), seen.rows, tokens)

    value, weak = share(head.seen), share(planted(head.weight(0), head.terms, mixed=False)[1])
    metric = "share of lm_head's rows whose token is found from full logits"
    adversary = "A8, who sees full logits and holds the exposed half"
    verdict = verdict_of(value, 1 / vocabulary, vocabulary)
    interval = interval_of(value, vocabulary)
    return [Attack("full_logits", subject.scheme, adversary, metric, value, 1 / vocabulary, weak, vocabulary, verdict, interval)]
