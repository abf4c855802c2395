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
from cloven.audit.slip.subject import AttackedGroup, Subject
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

    def __init__(self, member: SplitLinear, rank: int, random: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, member.in_features, generator=random) / member.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(member.out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """W + B A."""
        return weight + self.b @ self.a


@dataclass(frozen=True)
class Run:
    """One training: the share of knowledge at its end, and the perplexity after so many tokens."""

    knowledge: float
    curve: tuple[tuple[float, float], ...]


def _trainable(subject: Subject, matrix: Callable[[AttackedGroup, int], Tensor]) -> PreTrainedModel:
    """A model whose matrices are copies of these, to be learnt; everything else is the gift, and frozen."""
    model = subject.with_matrices(lambda group, part: matrix(group, part).clone())
    for group in subject.groups:
        for member, _ in group.parts:
            _linear(model, member).weight.requires_grad_(True)
    return model


def _low_rank(subject: Subject) -> PreTrainedModel:
    model, random = subject.with_matrices(_unscrambled), subject.random("low rank")
    for group in subject.groups:
        for member, _ in group.parts:
            rank = max(1, member.secret_a.shape[0])
            parametrize.register_parametrization(_linear(model, member), "weight", _LowRank(member, rank, random))
    return model


def _linear(model: PreTrainedModel, member: SplitLinear) -> nn.Linear:
    linear = model.get_submodule(member.name)
    assert isinstance(linear, nn.Linear)
    return linear


def _unscrambled(group: AttackedGroup, part: int) -> Tensor:
    return group.exposed[group.parts[part][1]]


def _as_they_lie(group: AttackedGroup, part: int) -> Tensor:
    """The rows and columns of the codes as they lie, at the size of the true scales."""
    codes, exposed = group.codes[group.parts[part][1]].float(), _unscrambled(group, part)
    scaled: Tensor = codes * (exposed.norm() / codes.norm().clamp_min(1e-30))
    return scaled


def _random(group: AttackedGroup, part: int, random: torch.Generator) -> Tensor:
    exposed = _unscrambled(group, part)
    noise = torch.randn(exposed.shape, generator=random)
    scaled: Tensor = noise * (exposed.norm() / noise.norm())
    return scaled


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
    attacks: dict[str, Start] = {
        "recovery_full": lambda: _trainable(subject, _unscrambled),
        "recovery_low_rank": lambda: _low_rank(subject),
    }
    if subject.scrambled:
        attacks["recovery_scrambled"] = lambda: _trainable(subject, _as_they_lie)

    def from_random() -> PreTrainedModel:
        coin = subject.random("matrices")
        return _trainable(subject, lambda group, part: _random(group, part, coin))

    baselines: dict[str, Start] = {"random matrices": from_random}
    if subject.relative is not None:
        baselines["public relative"] = lambda: _trainable(subject, lambda group, part: subject.relative_weight(group.parts[part][0]))
    control: dict[str, Start] = {"nothing secret": lambda: _trainable(subject, lambda group, part: group.weight(part))}
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
