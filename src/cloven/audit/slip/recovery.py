"""How far does training bring a thief of the exposed half?

Adversary: A1 with data: given embeddings, norms, biases and scales, and as much text sampled from the model (its black-box outputs) as
    it likes.
Method: fine-tune the exposed half by AdamW, with the best of three rates in a short trial: all of its matrices, by the text and by the
    model's distributions (distillation); or only low-rank factors in the place of the secret part. With the scramble undone; as it
    lies, by text and distilled; and put in order by a public relative, where there is one (`weight_directions`). The baselines, with the
    same steps and the same gifts: random matrices and the relative, where there is one, by text and distilled.
Success: the share of the model's knowledge that is recovered (see `exposed_half`), beyond the best baseline's that saw the same outputs
    (text alone, or distributions too), which is what anybody can have without the exposed half. Broken: more than half of the way from
    the baseline to the model. No claim is made on less than 20,000 tokens.
Weakened: nothing secret: the same training from the whole model, as it is at its end.
Source: fine-tuning attacks on partially exposed models are published; measuring them against the best baseline is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, Verdict
from cloven.audit.figure import Figure
from cloven.audit.slip.exposed_half import NO_BETTER, as_they_lie, knowledge, nothing, unscrambled
from cloven.audit.slip.guessed_subspace import inside_a_guess, inside_a_hole
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.audit.slip.training import BATCH, WINDOW, Budget, Run, Start, enough, few, steps_of, train, trainable
from cloven.audit.slip.weight_directions import aligned_matrix
from cloven.slip.layer import SplitLinear

_WITHOUT_KEYS = ("recovery_scrambled", "recovery_scrambled_distilled", "recovery_aligned")
_ADVERSARY = "A1, given embeddings, norms and scales, with text"


class _LowRank(nn.Module):
    """W ↦ W + B A with B and A to be learnt; B begins at zero."""

    def __init__(self, member: SplitLinear, rank: int, random: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, member.in_features, generator=random) / member.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(member.out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """W + B A."""
        return weight + self.b @ self.a


def _low_rank(subject: Subject) -> PreTrainedModel:
    model, random = subject.with_matrices(unscrambled), subject.random("low rank")
    for group in subject.groups:
        for member, _ in group.parts:
            rank = max(1, member.secret_a.shape[0])
            parametrize.register_parametrization(model.get_submodule(member.name), "weight", _LowRank(member, rank, random))
    return model


def _random(subject: Subject) -> PreTrainedModel:
    coin = subject.random("matrices")

    def matrix(group: AttackedGroup, part: int) -> Tensor:
        exposed = unscrambled(group, part)
        noise = torch.randn(exposed.shape, generator=coin)
        scaled: Tensor = noise * (exposed.norm() / noise.norm())
        return scaled

    return trainable(subject, matrix)


def baselines(subject: Subject) -> dict[str, Start]:
    """What anybody can do without the exposed half."""
    starts = {
        "random matrices": Start(lambda: _random(subject)),
        "random matrices, distilled": Start(lambda: _random(subject), distilled=True),
    }
    if subject.relative is not None:
        public = lambda: trainable(subject, lambda group, part: subject.relative_weight(group.parts[part][0]))  # noqa: E731
        starts["public relative"], starts["public relative, distilled"] = Start(public), Start(public, distilled=True)
    return starts


def attacks_of(subject: Subject) -> dict[str, Start]:
    """The attacks."""
    full = lambda: trainable(subject, unscrambled)  # noqa: E731
    starts = {
        "recovery_full": Start(full),
        "recovery_distilled": Start(full, distilled=True),
        "recovery_low_rank": Start(lambda: _low_rank(subject)),
        "recovery_guessed_subspace": inside_a_guess(subject),
    }
    if subject.scrambled:
        lying = lambda: trainable(subject, as_they_lie)  # noqa: E731
        starts["recovery_scrambled"], starts["recovery_scrambled_distilled"] = Start(lying), Start(lying, distilled=True)
        if subject.relative is not None:
            starts["recovery_aligned"] = Start(lambda: trainable(subject, lambda group, part: aligned_matrix(subject, group, part)))
    return starts


def recovery(
    subject: Subject, data: Tensor, budget: Budget, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> tuple[list[Attack], list[Figure]]:
    """See the module.

    Args:
        data: text to train on, int64 [sequences, WINDOW].
        budget: for all trainings together.

    Raises:
        TooLittleTime: for these.
    """
    base, attacks = baselines(subject), attacks_of(subject)
    whole = "nothing secret"
    controls = {
        whole: Start(lambda: trainable(subject, lambda group, part: group.weight(part))),
        "guessed subspace, no decoy": inside_a_hole(subject),
    }
    starts, runs = {**base, **attacks, **controls}, dict[str, Run]()
    with torch.enable_grad():
        steps = steps_of(subject, starts.values(), data, budget)
        for number, (name, start) in enumerate(starts.items()):
            progress("training", number, len(starts))
            runs[name] = train(subject, start, data, steps)
    found = []
    for name, start in attacks.items():
        alike = [runs[other] for other, baseline in base.items() if start.distilled or not baseline.distilled]
        best = min(alike, key=lambda run: run.perplexity)
        found.append(_attack(subject, name, runs[name], best, _control(runs, name), steps * BATCH * WINDOW))
    kinds = {**dict.fromkeys(base, "baseline: "), **dict.fromkeys(controls, "control: ")}
    series = {f"{kinds.get(name, '')}{name.removeprefix('recovery_')}": run.curve for name, run in runs.items()}
    note = (
        "An attack gains what its line lies below the baselines', which need no exposed half. Lines called scrambled or aligned are "
        "of who has no keys; all others, of who was given them. Controls show that training itself works."
    )
    return found, [Figure("recovery", "Recovery by training", "tokens trained on", "perplexity", series, log_x=True, log_y=True, note=note)]


def _control(runs: dict[str, Run], name: str) -> Run:
    return runs["guessed subspace, no decoy" if name == "recovery_guessed_subspace" else "nothing secret"]


def _attack(subject: Subject, name: str, run: Run, baseline: Run, control: Run, tokens: int) -> Attack:
    value, best = (knowledge(one.perplexity, subject) for one in (run, baseline))
    weak = knowledge(control.last, subject)
    ahead = math.log(baseline.perplexity) - math.log(run.perplexity)  # nats; shares are cut off at nothing
    no_better = ahead <= NO_BETTER * max(0.0, min(nothing(subject.text), math.log(baseline.perplexity)) - subject.nats)
    shown: Verdict = "broken" if value > (1 + best) / 2 else "holds" if no_better else "measured"
    verdict = enough(shown, tokens)
    adversary = _ADVERSARY + (", and the scramble" if subject.scrambled and name not in _WITHOUT_KEYS else "")
    metric = f"share of the model's knowledge after training on {tokens:,} tokens; chance: the best baseline's of its kind"
    metric += few(shown, tokens)
    details = {
        "perplexity": run.perplexity,
        "perplexity_of_the_best_baseline": baseline.perplexity,
        "perplexity_minus_the_best_baseline": run.perplexity - baseline.perplexity,
        "rate": run.rate,
    }
    return Attack(name, subject.scheme, adversary, metric, value, best, weak, tokens, verdict, details=details)
