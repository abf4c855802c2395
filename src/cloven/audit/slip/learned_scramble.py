"""Can the scramble be learnt by gradient?

Adversary: A1 with data: given embeddings, norms, biases and scales, and text sampled from the model.
Method: trained by AdamW to predict the text, through the whole model, with the codes as they are: of a scramble that mixes every group's
    two bases, as square matrices that begin at one; of permutations, the bundle's or the same matrices' under these alone, doubly
    stochastic matrices (Sinkhorn) and real numbers for the signs, which begin at the match with a public relative
    (`weight_directions`), or at random. At the end places are read off by assignment.
Success: the share of the bases of rows and columns that is found, as for unscrambling. Chance: 1 / dimension. No claim is made on less
    than 20,000 tokens.
Weakened: they begin near the answer: at the match with a planted near-duplicate (1 % noise) of every matrix; at the true bases with
    noise. Training must not lose what is found.
Source: learning permutations through Sinkhorn's operator: Mena et al. 2018; the use is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, interval_of, verdict_of
from cloven.audit.slip.exposed_half import knowledge
from cloven.audit.slip.matching import Alignment, aligned_to, assigned, doubly_stochastic
from cloven.audit.slip.scrambled import share_of
from cloven.audit.slip.subject import AttackedGroup, Subject, compared
from cloven.audit.slip.training import BATCH, WINDOW, Budget, Start, enough, few, steps_of, train
from cloven.audit.slip.unscrambling import with_noise
from cloven.audit.slip.weight_directions import guesses
from cloven.slip.exposed_matrix import expose

MOST_PLACES = 2048  # a permutation is a matrix of its square
_RATE = 0.05
_NEAR = 0.2  # noise of the bases that the control begins at, as a share of them
_BELIEF = 6.0  # of a match that is begun with, in nats
Progress = Callable[[str, int, int], None]


class _Order(nn.Module):
    """One group's matrix in an order to be learnt: Rᵀ (s ∘ X ∘ t) C."""

    def __init__(self, group: AttackedGroup, begin: Alignment | None, random: torch.Generator) -> None:
        super().__init__()
        self.codes = nn.Parameter(group.coarse(), requires_grad=False)
        n, k = self.codes.shape
        rows, columns = group.sizes()
        self.sizes = nn.Parameter(rows[:, None] * columns, requires_grad=False)
        self.rows, self.columns = (nn.Parameter(torch.randn(size, size, generator=random)) for size in (n, k))
        self.row_signs, self.column_signs = (nn.Parameter(1 + 0.5 * torch.randn(size, generator=random)) for size in (n, k))
        if begin is not None:
            with torch.no_grad():
                for logits, places in ((self.rows, begin.rows), (self.columns, begin.columns)):
                    logits[torch.arange(len(places)), places] += _BELIEF
                self.row_signs.copy_(begin.row_signs)
                self.column_signs.copy_(begin.column_signs)
        self.matrix = torch.empty(0)

    def compute(self) -> None:
        """For the pass that begins."""
        signed = self.row_signs[:, None] * self.codes * self.column_signs
        self.matrix = self.sizes * (doubly_stochastic(self.rows).t() @ (signed @ doubly_stochastic(self.columns)))


class _Ordered(nn.Module):
    """A linear whose matrix are rows of a group's."""

    def __init__(self, order: _Order | _Bases, rows: slice, bias: Tensor | None) -> None:
        super().__init__()
        self.order, self._rows, self.bias = order, rows, bias

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        return nn.functional.linear(x, self.order.matrix[self._rows], self.bias)


class _Bases(nn.Module):
    """One group's matrix in bases to be learnt: Lᵀ X R."""

    def __init__(self, group: AttackedGroup, begin: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.codes = nn.Parameter(group.coarse(), requires_grad=False)
        rows, columns = group.sizes()
        self.sizes = nn.Parameter(rows[:, None] * columns, requires_grad=False)
        first, second = begin if begin is not None else (torch.eye(size) for size in self.codes.shape)
        self.rows, self.columns = nn.Parameter(first), nn.Parameter(second)
        self.matrix = torch.empty(0)

    def compute(self) -> None:
        """For the pass that begins."""
        self.matrix = self.sizes * (self.rows.t() @ self.codes @ self.columns)


def _with(subject: Subject, orders: Sequence[_Order | _Bases]) -> PreTrainedModel:
    """The model with matrices in an order that is learnt."""
    model = subject.with_matrices(lambda group, part: group.exposed[group.parts[part][1]])
    for group, order in zip(subject.groups, orders, strict=True):
        for member, rows in group.parts:
            model.set_submodule(member.name, _Ordered(order, rows, member.bias))

    def compute(_model: nn.Module, _arguments: object) -> None:
        for order in orders:
            order.compute()

    model.register_forward_pre_hook(compute)
    return model


def _model(subject: Subject, begin: Sequence[Alignment | None]) -> PreTrainedModel:
    random = subject.random("permutations")
    return _with(subject, [_Order(group, one, random) for group, one in zip(subject.groups, begin, strict=True)])


def _mixed_model(subject: Subject, *, planted: bool) -> PreTrainedModel:
    random = subject.random("bases")

    def near(truth: Tensor) -> Tensor:
        noise = torch.randn(truth.shape, generator=random) * math.sqrt(1 / len(truth))
        return truth + _NEAR * noise

    def true(group: AttackedGroup) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.linalg.inv(basis).t() for basis in (group.seen.rows, group.seen.columns))
        return near(rows), near(columns)

    return _with(subject, [_Bases(group, true(group) if planted else None) for group in subject.groups])


def _places(subject: Subject, model: PreTrainedModel) -> float:
    """The share of the bases, over all groups."""
    found = total = 0.0
    for group in subject.groups:
        ordered = model.get_submodule(group.parts[0][0].name)
        assert isinstance(ordered, _Ordered)
        for learnt, truth in ((ordered.order.rows, group.seen.rows), (ordered.order.columns, group.seen.columns)):
            if isinstance(ordered.order, _Bases):
                share = share_of(torch.arange(len(truth)), learnt.detach(), torch.linalg.inv(truth).t())
            else:
                share = share_of(assigned(learnt.detach()), truth, torch.eye(len(truth)))
            found += share * len(truth)
            total += len(truth)
    return found / total


def _planted(group: AttackedGroup) -> Alignment:
    """The match with a near-duplicate."""
    return aligned_to(group.coarse(), expose(with_noise(group.exposed), 1, None).codes.float())


def learned_scramble(subject: Subject, data: Tensor, budget: Budget, progress: Progress = lambda stage, done, total: None) -> list[Attack]:
    """See the module. Arguments as of `recovery`; none where there is no scramble, or a matrix is too large."""
    if any(max(group.exposed.shape) > MOST_PLACES for group in subject.groups):
        return []
    systems = compared(subject)
    return [_attack(one, data, budget.part(1 / len(systems)), progress) for one in systems]


def _attack(subject: Subject, data: Tensor, budget: Budget, progress: Progress) -> Attack:
    if subject.scramble == "mixing":
        name, what = "learned_bases", "learning bases"
        starts = [Start(lambda planted=planted: _mixed_model(subject, planted=planted)) for planted in (False, True)]  # type: ignore[misc]
    else:
        name, what = "learned_permutations", "learning permutations"
        with torch.no_grad():
            match = tuple(found and found.alignment for found in guesses(subject)), tuple(_planted(group) for group in subject.groups)
        starts = [Start(lambda begin=begin: _model(subject, begin), rate=_RATE) for begin in match]  # type: ignore[misc]
    with torch.enable_grad():
        steps = steps_of(subject, starts, data, budget)
        runs = []
        for number, start in enumerate(starts):
            progress(what, number, len(starts))
            runs.append(train(subject, start, data, steps))
    with torch.no_grad():
        value, weak = (_places(subject, run.model) for run in runs)
    sides = [side for group in subject.groups for side in group.exposed.shape]
    places, tokens = sum(sides), steps * BATCH * WINDOW
    chance, details = len(sides) / places, {"perplexity": runs[0].perplexity, "knowledge": knowledge(runs[0].perplexity, subject)}
    shown = verdict_of(value, chance, places)
    metric = f"share of the bases of rows and columns that was learnt by gradient on {tokens:,} tokens{few(shown, tokens)}"
    relative = ", who has a public relative" if subject.relative is not None and name == "learned_permutations" else ""
    adversary = f"A1, given embeddings, norms and scales, with text{relative}"
    verdict, interval = enough(shown, tokens), interval_of(value, places)
    return Attack(name, subject.scheme, adversary, metric, value, chance, weak, places, verdict, interval, details)
