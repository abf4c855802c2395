"""What is the exposed half worth by itself?

Adversary: A1, or a thief of the worker's disk; once with embeddings, norms, biases and scales given for free, once without.
Method: run the model with zero in the place of the secret part; then with a random part of the same spectrum; and, where a public
    relative was named, with the relative's own top components. Zero once as the matrices lie, and else with the scramble undone (the
    worst case, in which only the secret part is missing). Without gifts the embeddings are random or the relative's, norms one or the
    relative's, biases zero, and every row and column of a matrix has the same scale.
Success: the share of what the model knows of the text that is left: 1 − (L − L_model) / (L_nothing − L_model), L in nats per token,
    where "nothing" is the best guess without the matrices: the frequencies of the tokens in the text itself. Chance: 0; where the
    relative's components are taken, or the secret is a difference from a public base, what the relative knows by itself. Holds up to 2 %
    of the way from there to the model; broken from half of it on.
Weakened: nothing secret: the whole model, which knows all.
Source: the measure is ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, Verdict
from cloven.audit.exposed_only import exposed_only
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.zoo.text import perplexity

NO_BETTER = 0.02  # of what the model knows beyond chance
_ROUNDING = 3e-3  # an exposed half is quantised, a relative is not: up to 1.4e-3 between splits of the demo model with different keys
Matrix = Callable[[AttackedGroup, int], Tensor]


def nothing(text: Tensor) -> float:
    """Nats per token of a guess by the tokens' frequencies in the text itself: better than any attacker's who has no matrices."""
    counts = torch.bincount(text[:, 1:].flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def knowledge(perplexity_reached: float, subject: Subject) -> float:
    """The share of what the unsplit model knows of the text, between 0 and 1, of a model with this perplexity."""
    best, worst = subject.nats, nothing(subject.text)
    if worst <= best:
        return 0.0
    return min(1.0, max(0.0, (worst - math.log(perplexity_reached)) / (worst - best)))


def random_secret(exposed: Tensor, secret_b: Tensor, secret_a: Tensor, random: torch.Generator) -> Tensor:
    """E with something as large as the secret B A on it, in random directions."""
    sizes = torch.linalg.svdvals(secret_b @ torch.linalg.qr(secret_a.t())[1].t()) if len(secret_a) else secret_b.new_empty(0)
    left, right = (torch.linalg.qr(torch.randn(n, len(secret_a), generator=random, dtype=sizes.dtype))[0] for n in exposed.shape)
    matrix: Tensor = exposed + ((left * sizes) @ right.t()).to(exposed.dtype)
    return matrix


def relatives_secret(exposed: Tensor, k: int, weight: Tensor) -> Tensor:
    """The relative's own top k components in the place of what E holds there."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    matrix: Tensor = exposed - exposed @ vt[:k].t() @ vt[:k] + (u[:, :k] * s[:k]) @ vt[:k]
    return matrix


def without_gifts(model: PreTrainedModel, subject: Subject) -> PreTrainedModel:
    """The same matrices with embeddings, norms and biases that the attacker makes up, or takes from a relative."""
    mine = {member.name for group in subject.groups for member, _ in group.parts}
    shared: dict[int, nn.Parameter] = {id(p): p for name in mine for p in [model.get_submodule(name).get_parameter("weight")]}
    twin: PreTrainedModel = copy.deepcopy(model, shared)
    public = dict(subject.relative.named_parameters()) if subject.relative is not None else {}
    random = subject.random("gifts")
    for name, parameter in list(twin.named_parameters()):
        where, _, kind = name.rpartition(".")
        if where in mine and kind == "weight":
            continue
        if name in public and public[name].shape == parameter.shape:
            parameter.data = public[name].detach().to(parameter.dtype)
        elif parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=random) * parameter.std()
        else:  # a norm's weight is about one, or about zero where the code adds one to it (Gemma's)
            neutral = 1.0 if kind == "weight" and float(parameter.mean()) > 0.5 else 0.0
            parameter.data = torch.full_like(parameter, neutral)
    return twin


def as_they_lie(group: AttackedGroup, part: int) -> Tensor:
    """The first term's rows and columns as they lie, with the true scales in the model's order: float32 [N, K]."""
    rows, columns = group.sizes()
    scaled: Tensor = group.coarse() * rows[:, None] * columns
    return scaled[group.parts[part][1]]


def unscrambled(group: AttackedGroup, part: int) -> Tensor:
    """E of one member, float32 [N, K]."""
    return group.exposed[group.parts[part][1]]


def verdict_beside(value: float, chance: float) -> Verdict:
    """Of shares of knowledge, where chance is what anybody has: broken from half of the rest on, holds up to NO_BETTER of it."""
    gained, rest = value - chance, 1 - chance
    return "holds" if gained <= max(NO_BETTER * rest, _ROUNDING) else "broken" if gained >= rest / 2 else "measured"


@torch.no_grad()
def exposed_half(subject: Subject) -> list[Attack]:
    """See the module."""
    found = []
    for name, gifts, model in _systems(subject):
        reached, tokens = perplexity(model, subject.text), subject.text[:, 1:].numel()
        value, chance = knowledge(reached, subject), 0.0
        given = ["embeddings, norms and scales"] * gifts + ["the scramble"] * (subject.scrambled and name != "exposed_half")
        adversary = "A1" + (f", given {' and '.join(given)}" if given else "")
        metric = f"share of the model's knowledge of {tokens} tokens that the exposed half keeps without training"
        if subject.relative is not None and (name == "exposed_half_relatives_secret" or subject.origin != "private"):
            chance = knowledge(perplexity(subject.relative, subject.text), subject)
            adversary, metric = f"{adversary}, who has a public relative", f"{metric}; chance: the relative's own"
        name, verdict = name + ("" if gifts else "_without_gifts"), verdict_beside(value, chance)
        details = {"perplexity": reached, "perplexity_of_the_model": math.exp(subject.nats)}
        weak = knowledge(math.exp(subject.nats), subject)
        found.append(Attack(name, subject.scheme, adversary, metric, value, chance, weak, tokens, verdict, details=details))
    return found


def _systems(subject: Subject) -> Iterator[tuple[str, bool, PreTrainedModel]]:
    """(name, whether there are gifts, the attacker's model)."""
    if subject.scrambled:
        yield "exposed_half", True, exposed_only(subject.split, subject.exposed, knows_scramble=False)
        yield "exposed_half", False, without_gifts(subject.with_matrices(as_they_lie), subject)
    for gifts in (True, False):
        exposed, random = unscrambled if gifts else AttackedGroup.without_scales, subject.random("exposed half")

        def zero(group: AttackedGroup, part: int, exposed: Matrix = exposed) -> Tensor:
            return exposed(group, part)

        def at_random(group: AttackedGroup, part: int, exposed: Matrix = exposed, random: torch.Generator = random) -> Tensor:
            member = group.parts[part][0]
            return random_secret(exposed(group, part), member.secret_b, member.secret_a, random)

        def from_relative(group: AttackedGroup, part: int, exposed: Matrix = exposed) -> Tensor:
            member = group.parts[part][0]
            return relatives_secret(exposed(group, part), member.secret_a.shape[0], subject.relative_weight(member))

        systems = {"unscrambled": zero, "random_secret": at_random}
        if subject.relative is not None:
            systems["relatives_secret"] = from_relative
        for name, matrix in systems.items():
            model = subject.with_matrices(matrix)
            yield f"exposed_half_{name}", gifts, model if gifts else without_gifts(model, subject)
