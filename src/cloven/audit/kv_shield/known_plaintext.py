"""How much known text gives the rest away?

Adversary: A3, who has the public model and a snapshot of layer 0's rows of v, and knows how the text begins: a system prompt, say.
Method: the keyed rows are linear in the plain ones, v' = [v, noise] F. From n known tokens the thief solves v = v' N by least squares for
    every kv head, undoes the rows that follow, and looks them up in the table of the public model's rows. For n a quarter and one half of
    the width d + ρ of a keyed row, and for eight more than it.
Success: the share of the tokens after the known ones recovered. Chance: the commonest token, always.
Weakened: mode none, a cache without keys.
Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield.guesses import hits, in_every_mode
from cloven.audit.kv_shield.subject import Subject
from cloven.audit.kv_shield.table import by_table


def by_known_plaintext(rows: Tensor, table: Tensor, tokens: Tensor, known: int) -> Tensor:
    """Guesses for the tokens after the first `known` ones, which are known."""
    plain = table[tokens[:known]]
    recovered = []
    for head in range(rows.shape[1]):
        n = torch.linalg.lstsq(rows[:known, head].double(), plain[:, head].double(), driver="gelsd").solution  # v' N = v
        recovered.append((rows[known:, head].double() @ n).float())
    return by_table(torch.stack(recovered, 1), table)


def known_plaintext(subject: Subject) -> list[Attack]:
    """See the module."""
    tokens, full = subject.tokens, subject.layer.shape.head_dim + subject.noise
    results = []
    for known, name in ((full // 4, "known_plaintext_quarter"), (full // 2, "known_plaintext_half"), (full + 8, "known_plaintext")):
        found = {
            mode: hits(by_known_plaintext(rows, subject.layer.table, tokens, known), tokens[known:])
            for mode, rows in subject.caches.items()
        }
        metric = f"fraction of tokens recovered once {known} are known (d + ρ = {full})"
        results += in_every_mode(name, metric, found, subject.chance, len(tokens) - known)
    return results
