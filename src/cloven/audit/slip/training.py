"""How attackers train: AdamW on text sampled from the model, or on the model's own distributions (distillation)."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.audit.attack import Verdict
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.zoo.text import perplexity, sample_text

BATCH, WINDOW = 8, 128
RATES = (3e-4, 1e-3, 3e-3)  # of AdamW; a short trial tells which is best
_TRIAL = 20  # of the steps, one is a trial, for every rate
GROWTH = 2.2  # of the tokens from one point of a curve to the next
LEAST_STEPS = 3
ENOUGH_TOKENS = 20_000
MOST_SEQUENCES = 512
SAMPLED_AT_A_TIME = 128  # sequences
_SAMPLING = 0.2  # of the time that is given, at most, but for the first ones
_MOST_STEPS = 10**6


class TooLittleTime(Exception):
    """Not even a few steps fit in the time that was given."""


@dataclass(frozen=True)
class Budget:
    """How long attackers train: `seconds` for all trainings together; or `steps` for each, whatever that takes."""

    seconds: float = math.inf
    steps: int | None = None

    def part(self, share: float) -> Budget:
        """A share of the seconds; the same steps."""
        return replace(self, seconds=share * self.seconds)


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Args:
        model: makes the model; what requires a gradient is learnt.
        distilled: learn the unsplit model's distributions, which a generous API shows, not its text alone.
        rate: of AdamW; None: the best of `RATES` in a short trial.
    """

    model: Callable[[], PreTrainedModel]
    distilled: bool = False
    rate: float | None = None


@dataclass(frozen=True)
class Run:
    """One training: the model at its end, the perplexity before it, and after so many tokens; the rate."""

    model: PreTrainedModel
    before: float
    curve: tuple[tuple[float, float], ...]
    rate: float

    @property
    def perplexity(self) -> float:
        """The least one on the way: the attacker keeps the best model."""
        return min(self.before, *(value for _, value in self.curve))

    @property
    def last(self) -> float:
        """That at the end: what a control must not lose."""
        return self.curve[-1][1]


def trainable(subject: Subject, matrix: Callable[[AttackedGroup, int], Tensor]) -> PreTrainedModel:
    """A model whose matrices are copies of these, to be learnt; everything else is the gift, and frozen."""
    model = subject.with_matrices(lambda group, part: matrix(group, part).clone())
    for group in subject.groups:
        for member, _ in group.parts:
            model.get_submodule(member.name).get_parameter("weight").requires_grad_(True)
    return model


def enough(verdict: Verdict, tokens: int) -> Verdict:
    """The verdict; but training on few tokens does not show that it is of no use."""
    return "measured" if verdict == "holds" and tokens < ENOUGH_TOKENS else verdict


def few(verdict: Verdict, tokens: int) -> str:
    """The reason for what `enough` changes, to be added to a metric."""
    return f"; no claim on fewer than {ENOUGH_TOKENS:,} tokens" if enough(verdict, tokens) != verdict else ""


class _Trainer:
    """A model under training."""

    def __init__(self, subject: Subject, start: Start, data: Tensor, rate: float) -> None:
        self.model, self._data, self._random = start.model(), data, subject.random("batches")
        self._teacher = subject.plain if start.distilled else None
        learnt = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(learnt, lr=rate, weight_decay=0.0)

    def step(self) -> None:
        """One batch."""
        batch = self._data[torch.randint(len(self._data), (BATCH,), generator=self._random)]
        self.model.train()
        if self._teacher is None:
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        else:
            with torch.no_grad():
                right = self._teacher(input_ids=batch, use_cache=False).logits.log_softmax(-1)
            guess = self.model(input_ids=batch, use_cache=False).logits.log_softmax(-1)
            loss = torch.nn.functional.kl_div(guess.flatten(0, 1), right.flatten(0, 1), reduction="batchmean", log_target=True)
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()


def train(subject: Subject, start: Start, data: Tensor, steps: int) -> Run:
    """Train for that many steps on token ids [sequences, WINDOW]."""
    rate = start.rate if start.rate is not None else _best_rate(subject, start, data, trial_steps(steps))
    trainer, curve, mark = _Trainer(subject, start, data, rate), list[tuple[float, float]](), 1
    before = perplexity(trainer.model.eval(), subject.text)
    for done in range(1, steps + 1):
        trainer.step()
        if done in (mark, steps):
            mark = math.ceil(mark * GROWTH)
            curve.append((float(done * BATCH * WINDOW), perplexity(trainer.model.eval(), subject.text)))
    return Run(trainer.model.eval(), before, tuple(curve), rate)


def trial_steps(steps: int) -> int:
    """Steps of a trial with one rate, before a training of so many."""
    return max(2, steps // _TRIAL)


def _best_rate(subject: Subject, start: Start, data: Tensor, steps: int) -> float:
    """The rate with the least perplexity after a trial."""

    def reached(rate: float) -> float:
        trainer = _Trainer(subject, start, data, rate)
        for _ in range(steps):
            trainer.step()
        value = perplexity(trainer.model.eval(), subject.text)
        return value if math.isfinite(value) else math.inf

    return min(RATES, key=reached)


def training_text(subject: Subject, budget: Budget) -> Tensor:
    """Text sampled from the model, another than what is measured on, as much as its share of the time allows: int64 [sequences, WINDOW].

    Raises:
        TooLittleTime: for one batch.
    """
    began, parts, sampled = time.monotonic(), list[Tensor](), 0
    while sampled < MOST_SEQUENCES and (not parts or time.monotonic() - began < _SAMPLING * budget.seconds):
        count = min(SAMPLED_AT_A_TIME if parts else BATCH, MOST_SEQUENCES - sampled)
        with torch.no_grad():
            parts.append(sample_text(subject.plain, count, WINDOW, int(subject.random(f"text {len(parts)}").initial_seed())))
        sampled += count
    if (took := time.monotonic() - began) > budget.seconds:
        raise TooLittleTime(f"to sample one batch of text took {took:.0f} s")
    return torch.cat(parts)


def steps_of(subject: Subject, starts: Collection[Start], data: Tensor, budget: Budget) -> int:
    """How many steps each training has: those given; or so many that all together take the time given, this measurement included.

    Raises:
        TooLittleTime: for LEAST_STEPS each.
    """
    if budget.steps is not None:
        return budget.steps
    began, step, look, trials = time.monotonic(), 0.0, 0.0, 0.0

    def cost(steps: int) -> float:
        return steps * step + _looks(steps) * look + trials

    for number, start in enumerate(starts, 1):
        trainer = _Trainer(subject, start, data, RATES[0])
        trainer.step()  # warms up
        started = time.monotonic()
        trainer.step()
        stepped = time.monotonic()
        perplexity(trainer.model.eval(), subject.text)
        looked = time.monotonic()
        rates = len(RATES) if start.rate is None else 0
        step += (stepped - started) * (1 + rates / _TRIAL)
        look += looked - stepped
        trials += rates * (looked - started)
        needed = (looked - began + cost(LEAST_STEPS)) * len(starts) / number
        if needed > budget.seconds and (number == len(starts) or looked - began > budget.seconds):
            raise TooLittleTime(f"{len(starts)} trainings of {LEAST_STEPS} steps would take about {math.ceil(needed):,} s")
    left = budget.seconds - (time.monotonic() - began)
    return max(LEAST_STEPS, bisect.bisect_right(range(1, _MOST_STEPS), left, key=cost))


def _looks(steps: int) -> int:
    """How often a training of so many steps looks at the perplexity: before it, at the points of its curve, and at its end."""
    return 2 + math.ceil(math.log(steps, GROWTH))
