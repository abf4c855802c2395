"""What is the exposed half worth by itself?

Adversary: A1, or a thief of the worker's disk, who is given embeddings, norms, biases and scales for free.
Method: run the model with zero in the place of the secret part; then with a random part of the same spectrum; and, where a public
    relative was named, with the relative's own top components. Once as the matrices lie, and once with the scramble undone (the worst
    case, in which only the secret part is missing).
Success: the share of what the model knows of the text that is left: 1 − (L − L_model) / (L_nothing − L_model), L in nats per token,
    where "nothing" is the best guess without the matrices: the frequencies of the tokens in the text itself.
Weakened: nothing secret: the whole model, which knows all.
Source: the measure is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.exposed_only import exposed_only
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.zoo.text import perplexity


def nothing(text: Tensor) -> float:
    """Nats per token of a guess by the tokens' frequencies in the text itself: better than any attacker's who has no matrices."""
    counts = torch.bincount(text[:, 1:].flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def knowledge(model: PreTrainedModel, subject: Subject) -> float:
    """The share of what the unsplit model knows of the text, between 0 and 1."""
    best, worst = subject.nats, nothing(subject.text)
    if worst <= best:
        return 0.0
    return min(1.0, max(0.0, (worst - math.log(perplexity(model, subject.text))) / (worst - best)))


def _random_secret(group: AttackedGroup, part: int, random: torch.Generator) -> Tensor:
    """As large as the secret, in random directions."""
    member, rows = group.parts[part]
    k = member.secret_a.shape[0]
    sizes = torch.linalg.svdvals(member.secret_b @ torch.linalg.qr(member.secret_a.t())[1].t()) if k else torch.empty(0)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=random))[0] for n in (member.out_features, member.in_features))
    matrix: Tensor = group.exposed[rows] + (left * sizes) @ right.t()
    return matrix


def _secret_of_relative(group: AttackedGroup, part: int, weight: Tensor) -> Tensor:
    """The relative's own top k components in the place of what the exposed half holds there."""
    member, rows = group.parts[part]
    k, exposed = member.secret_a.shape[0], group.exposed[rows]
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    matrix: Tensor = exposed - exposed @ vt[:k].t() @ vt[:k] + (u[:, :k] * s[:k]) @ vt[:k]
    return matrix


@torch.no_grad()
def exposed_half(subject: Subject) -> list[Attack]:
    """See the module."""
    systems = {"exposed_half": exposed_only(subject.split, subject.exposed, knows_scramble=False)} if subject.scrambled else {}
    systems["exposed_half_unscrambled"] = exposed_only(subject.split, subject.exposed, knows_scramble=True)
    random = subject.random("exposed half")
    systems["exposed_half_random_secret"] = subject.with_matrices(lambda group, part: _random_secret(group, part, random))
    if subject.relative is not None:
        systems["exposed_half_relatives_secret"] = subject.with_matrices(
            lambda group, part: _secret_of_relative(group, part, subject.relative_weight(group.parts[part][0]))
        )
    tokens = subject.text[:, 1:].numel()
    found = []
    for name, model in systems.items():
        value = knowledge(model, subject)
        adversary = "A1, given embeddings, norms and scales" + ("" if name == "exposed_half" else ", and the scramble")
        metric = f"share of the model's knowledge of {tokens} tokens that the exposed half keeps without training"
        verdict = verdict_of(value, 0.0, tokens)
        found.append(Attack(name, subject.scheme, adversary, metric, value, 0.0, 1.0, tokens, verdict))
    return found
