"""Can a scramble of permutations be learnt by gradient?

Adversary: A1 with data: given embeddings, norms, biases and scales, and text sampled from the model.
Method: every group's secret permutations are doubly stochastic matrices (Sinkhorn), its secret signs are real numbers, and all of them
    are trained by AdamW to predict the text, through the whole model. They begin at the match with a public relative
    (`weight_directions`), or at random. At the end places are read off by assignment. Of a bundle whose scramble mixes, the same
    matrices under permutations and signs alone are attacked: there are no places in it to be learnt.
Success: the share of places found, of rows and columns. Chance: 1 / places.
Weakened: they begin at the match with a planted near-duplicate (1 % noise) of every matrix: training must not lose what is found.
Source: learning permutations through Sinkhorn's operator: Mena et al. 2018; the use is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, interval_of, verdict_of
from cloven.audit.slip.exposed_half import knowledge
from cloven.audit.slip.matching import Alignment, aligned_to, assigned, doubly_stochastic
from cloven.audit.slip.scrambled import share_of
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.audit.slip.training import BATCH, WINDOW, Start, steps_that_fit, train
from cloven.audit.slip.unscrambling import with_noise
from cloven.audit.slip.weight_directions import guesses
from cloven.slip.exposed_matrix import expose

MOST_PLACES = 2048  # a permutation is a matrix of its square
_RATE = 0.05
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

    def __init__(self, order: _Order, rows: slice, bias: Tensor | None) -> None:
        super().__init__()
        self.order, self._rows, self.bias = order, rows, bias

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        return nn.functional.linear(x, self.order.matrix[self._rows], self.bias)


def _model(subject: Subject, begin: Sequence[Alignment | None]) -> PreTrainedModel:
    model, random = subject.with_matrices(lambda group, part: group.exposed[group.parts[part][1]]), subject.random("permutations")
    orders = [_Order(group, one, random) for group, one in zip(subject.groups, begin, strict=True)]
    for group, order in zip(subject.groups, orders, strict=True):
        for member, rows in group.parts:
            model.set_submodule(member.name, _Ordered(order, rows, member.bias))

    def compute(_model: nn.Module, _arguments: object) -> None:
        for order in orders:
            order.compute()

    model.register_forward_pre_hook(compute)
    return model


def _places(subject: Subject, model: PreTrainedModel) -> float:
    """The share of places, over all groups."""
    found = total = 0.0
    for group in subject.groups:
        ordered = model.get_submodule(group.parts[0][0].name)
        assert isinstance(ordered, _Ordered)
        for logits, truth in ((ordered.order.rows, group.seen.rows), (ordered.order.columns, group.seen.columns)):
            found += share_of(assigned(logits.detach()), truth, torch.eye(len(truth))) * len(truth)
            total += len(truth)
    return found / total


def _planted(group: AttackedGroup) -> Alignment:
    """The match with a near-duplicate."""
    return aligned_to(group.coarse(), expose(with_noise(group.exposed), 1, None).codes.float())


def learned_permutations(
    subject: Subject, data: Tensor, seconds: float, progress: Progress = lambda stage, done, total: None
) -> list[Attack]:
    """See the module. Arguments as of `recovery`; none where there is no scramble, or a matrix is too large."""
    if not subject.scrambled or any(max(group.exposed.shape) > MOST_PLACES for group in subject.groups):
        return []
    if subject.scramble != "permutation":
        subject = subject.permuted()
    with torch.no_grad():
        begins = {
            "attack": tuple(found and found.alignment for found in guesses(subject)),
            "planted": tuple(_planted(group) for group in subject.groups),
        }
    starts = [Start(lambda begin=begin: _model(subject, begin), rate=_RATE) for begin in begins.values()]  # type: ignore[misc]
    with torch.enable_grad():
        steps = steps_that_fit(subject, starts, data, seconds)
        runs = []
        for number, start in enumerate(starts):
            progress("learning permutations", number, len(starts))
            runs.append(train(subject, start, data, steps))
    value, weak = (_places(subject, run.model) for run in runs)
    sides = [side for group in subject.groups for side in group.exposed.shape]
    places, tokens = sum(sides), steps * BATCH * WINDOW
    chance, details = len(sides) / places, {"perplexity": runs[0].perplexity, "knowledge": knowledge(runs[0].perplexity, subject)}
    metric = f"share of rows and columns whose place was learnt by gradient on {tokens:,} tokens"
    relative = ", who has a public relative" if subject.relative is not None else ""
    adversary = f"A1, given embeddings, norms and scales, with text{relative}"
    verdict, interval = verdict_of(value, chance, places), interval_of(value, places)
    return [Attack("learned_permutations", subject.scheme, adversary, metric, value, chance, weak, places, verdict, interval, details)]
