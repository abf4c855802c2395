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

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.exposed_only import exposed_only
from cloven.audit.slip.subject import Subject, dense
from cloven.zoo.text import perplexity


def nothing(text: Tensor) -> float:
    """Nats per token of a guess by the tokens' frequencies in the text itself: better than any attacker's who has no matrices."""
    counts = torch.bincount(text[:, 1:].flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def knowledge(model: PreTrainedModel, subject: Subject) -> float:
    """The share of what the unsplit model knows of the text, between 0 and 1."""
    best, worst = math.log(perplexity(subject.plain, subject.text)), nothing(subject.text)
    if worst <= best:
        return 0.0
    return min(1.0, max(0.0, (worst - math.log(perplexity(model, subject.text))) / (worst - best)))


def with_parts(subject: Subject, parts: Iterator[Tensor]) -> PreTrainedModel:
    """The exposed half, unscrambled, with other matrices in the place of B A: one [N, K] for every linear, in order."""
    shared = {id(parameter): parameter for parameter in subject.plain.parameters()}
    model: PreTrainedModel = copy.deepcopy(subject.plain, shared)
    for group in subject.groups:
        for member, rows in group.parts:
            model.set_submodule(member.name, dense(group.exposed[rows] + next(parts), member.bias))
    return model.eval()


def _random_parts(subject: Subject) -> Iterator[Tensor]:
    """As large as the secret, in random directions."""
    random = subject.random("exposed half")
    for group in subject.groups:
        for member, _ in group.parts:
            k = member.secret_a.shape[0]
            sizes = torch.linalg.svdvals(member.secret_b @ torch.linalg.qr(member.secret_a.t())[1].t()) if k else torch.empty(0)
            left, right = (torch.linalg.qr(torch.randn(n, k, generator=random))[0] for n in (member.out_features, member.in_features))
            yield (left * sizes) @ right.t()


def _parts_of_relative(subject: Subject, relative: PreTrainedModel) -> Iterator[Tensor]:
    """The relative's own top k components less what the exposed half holds there."""
    for group in subject.groups:
        for member, rows in group.parts:
            k = member.secret_a.shape[0]
            u, s, vt = torch.linalg.svd(relative.get_submodule(member.name).weight.detach().float(), full_matrices=False)
            inside = group.exposed[rows] @ vt[:k].t() @ vt[:k]
            yield (u[:, :k] * s[:k]) @ vt[:k] - inside


@torch.no_grad()
def exposed_half(subject: Subject) -> list[Attack]:
    """See the module."""
    systems = {"exposed_half": exposed_only(subject.split, subject.exposed, knows_scramble=False)} if subject.scrambled else {}
    systems["exposed_half_unscrambled"] = exposed_only(subject.split, subject.exposed, knows_scramble=True)
    systems["exposed_half_random_secret"] = with_parts(subject, _random_parts(subject))
    if subject.relative is not None:
        systems["exposed_half_relatives_secret"] = with_parts(subject, _parts_of_relative(subject, subject.relative))
    tokens = subject.text[:, 1:].numel()
    found = []
    for name, model in systems.items():
        value = knowledge(model, subject)
        adversary = "A1, given embeddings, norms and scales" + ("" if name == "exposed_half" else ", and the scramble")
        metric = f"share of the model's knowledge of {tokens} tokens that the exposed half keeps without training"
        verdict = verdict_of(value, 0.0, tokens)
        found.append(Attack(name, subject.scheme, adversary, metric, value, 0.0, 1.0, tokens, verdict))
    return found
