"""How far does training bring a thief of the exposed half?

Adversary: A1 with data: given embeddings, norms, biases and scales, and as much text sampled from the model (its black-box outputs) as
    it likes.
Method: fine-tune the exposed half by AdamW, all of its matrices, or only low-rank factors in the place of the secret part; as it lies,
    and with the scramble undone. The same steps from random matrices with the same gifts, and from a public relative where the user has
    named one.
Success: the share of the model's knowledge that is recovered (see `exposed_half`), beyond the best baseline's, which is what anybody
    can have without the exposed half. Broken: more than half of the way from the baseline to the model.
Weakened: nothing secret: the same training from the whole model.
Source: fine-tuning attacks on partially exposed models are published; measuring them against the best baseline is ours.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, Verdict
from cloven.audit.figure import Figure
from cloven.audit.slip.exposed_half import knowledge
from cloven.audit.slip.subject import Subject, dense
from cloven.slip.layer import SplitLinear
from cloven.zoo.text import perplexity, sample_text

BATCH, WINDOW = 8, 128
RATE = 1e-3
GROWTH = 2.2  # of the tokens from one point of a curve to the next
LEAST_STEPS = 3
MOST_SEQUENCES = 512
Start = Callable[[], PreTrainedModel]


class _LowRank(nn.Module):
    """W ↦ W + B A with B and A to be learnt; B begins at zero."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """W + B A."""
        return weight + self.b @ self.a


@dataclass(frozen=True)
class Run:
    """One training: the share of knowledge at its end, and the perplexity after so many tokens."""

    knowledge: float
    curve: tuple[tuple[float, float], ...]


def _with_matrices(subject: Subject, matrix: Callable[[int, int], Tensor]) -> PreTrainedModel:
    """The model with other matrices: `matrix(group, part)`; everything else is the gift, and frozen."""
    shared = {id(parameter): parameter for parameter in subject.plain.parameters()}
    model: PreTrainedModel = copy.deepcopy(subject.plain, shared)
    for number, group in enumerate(subject.groups):
        for part, (member, _) in enumerate(group.parts):
            linear = dense(matrix(number, part), member.bias)
            linear.weight.requires_grad_(True)
            model.set_submodule(member.name, linear)
    return model.train()


def _as_they_lie(subject: Subject, number: int, part: int) -> Tensor:
    """The rows and columns of the codes as they lie, at the size of the true scales."""
    group = subject.groups[number]
    _, rows = group.parts[part]
    codes = group.codes[rows].float()
    scaled: Tensor = codes * (group.exposed[rows].norm() / codes.norm().clamp_min(1e-30))
    return scaled


def _random(subject: Subject, number: int, part: int) -> Tensor:
    group = subject.groups[number]
    exposed = group.exposed[group.parts[part][1]]
    noise = torch.randn(exposed.shape, generator=subject.random(f"matrix {number} {part}"))
    scaled: Tensor = noise * (exposed.norm() / noise.norm())
    return scaled


def _low_rank(subject: Subject) -> PreTrainedModel:
    model = _with_matrices(subject, lambda n, part: _unscrambled(subject, n, part))
    for group in subject.groups:
        for member, _ in group.parts:
            linear = model.get_submodule(member.name)
            assert isinstance(linear, nn.Linear)
            linear.weight.requires_grad_(False)
            parametrize.register_parametrization(
                linear, "weight", _LowRank(member.out_features, member.in_features, max(1, member.secret_a.shape[0]))
            )
    return model


def _unscrambled(subject: Subject, number: int, part: int) -> Tensor:
    group = subject.groups[number]
    return group.exposed[group.parts[part][1]].clone()


def _of_relative(subject: Subject, relative: PreTrainedModel, number: int, part: int) -> Tensor:
    member: SplitLinear = subject.groups[number].parts[part][0]
    weight: Tensor = relative.get_submodule(member.name).weight
    return weight.detach().float().clone()


class _Trainer:
    """A model under training."""

    def __init__(self, start: Start, data: Tensor, random: torch.Generator) -> None:
        self.model, self._data, self._random = start(), data, random
        learnt = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0.0)

    def step(self) -> None:
        """One batch."""
        batch = self._data[torch.randint(len(self._data), (BATCH,), generator=self._random)]
        loss = self.model.train()(input_ids=batch, labels=batch, use_cache=False).loss
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()


def train(subject: Subject, start: Start, data: Tensor, steps: int) -> Run:
    """Fine-tune for that many steps on token ids [sequences, WINDOW]."""
    trainer, curve, mark = _Trainer(start, data, subject.random("batches")), list[tuple[float, float]](), 1
    for done in range(1, steps + 1):
        trainer.step()
        if done in (mark, steps):
            mark = math.ceil(mark * GROWTH)
            curve.append((float(done * BATCH * WINDOW), perplexity(trainer.model.eval(), subject.text)))
    return Run(knowledge(trainer.model.eval(), subject), tuple(curve))


def steps_that_fit(subject: Subject, starts: Iterable[Start], data: Tensor) -> int:
    """How many steps each training may have, so that all of them together take the time that was given."""
    seconds = 0.0
    for start in starts:
        trainer = _Trainer(start, data, subject.random("batches"))
        trainer.step()  # warms up
        started = time.monotonic()
        trainer.step()
        seconds += time.monotonic() - started
    return max(LEAST_STEPS, int(subject.seconds / seconds))


def recovery(
    subject: Subject, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> tuple[list[Attack], list[Figure]]:
    """See the module."""
    attacks: dict[str, Start] = {"recovery_full": lambda: _with_matrices(subject, lambda n, part: _unscrambled(subject, n, part))}
    attacks["recovery_low_rank"] = lambda: _low_rank(subject)
    if subject.scrambled:
        attacks["recovery_scrambled"] = lambda: _with_matrices(subject, lambda n, part: _as_they_lie(subject, n, part))
    baselines: dict[str, Start] = {"random matrices": lambda: _with_matrices(subject, lambda n, part: _random(subject, n, part))}
    if (relative := subject.relative) is not None:
        baselines["public relative"] = lambda: _with_matrices(subject, lambda n, part: _of_relative(subject, relative, n, part))
    control: dict[str, Start] = {"nothing secret": lambda: _with_matrices(subject, lambda n, part: subject.groups[n].weight(part))}
    starts = {**baselines, **attacks, **control}
    with torch.no_grad():
        data = sample_text(subject.plain, MOST_SEQUENCES, WINDOW, subject.seed + 1)
    runs: dict[str, Run] = {}
    with torch.enable_grad():
        steps = steps_that_fit(subject, starts.values(), data)
        for number, (name, start) in enumerate(starts.items()):
            progress("training", number, len(starts))
            runs[name] = train(subject, start, data, steps)
    best = max(runs[name].knowledge for name in baselines)
    tokens, weak = steps * BATCH * WINDOW, runs["nothing secret"].knowledge
    found = []
    for name in attacks:
        value = runs[name].knowledge
        verdict: Verdict = "broken" if value > (1 + best) / 2 else "holds" if value <= best + 0.02 else "measured"
        adversary = "A1, given embeddings, norms and scales, with text" + ("" if name == "recovery_scrambled" else ", and the scramble")
        metric = f"share of the model's knowledge after training on {tokens:,} tokens; chance: the best baseline's"
        found.append(Attack(name, subject.scheme, adversary, metric, value, best, weak, tokens, verdict))
    series = {name: run.curve for name, run in runs.items()}
    return found, [Figure("recovery", "Recovery by training", "tokens trained on", "perplexity", series, log_x=True, log_y=True)]
