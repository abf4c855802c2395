"""All attacks on a SLIP bundle."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, controlled
from cloven.audit.figure import Figure
from cloven.audit.findings import Findings
from cloven.audit.slip.exposed_half import exposed_half, knowledge, nothing
from cloven.audit.slip.fractions import curve_over_fractions, spectra_figures
from cloven.audit.slip.full_logits import full_logits
from cloven.audit.slip.known_columns import known_columns
from cloven.audit.slip.learned_scramble import learned_scramble
from cloven.audit.slip.liars import liars
from cloven.audit.slip.lying_worker import lies_in_sessions
from cloven.audit.slip.matching import assigned
from cloven.audit.slip.null_space import null_space
from cloven.audit.slip.plaintext_adjacency import plaintext_adjacency
from cloven.audit.slip.recovery import recovery
from cloven.audit.slip.subject import Subject, open_subject
from cloven.audit.slip.symmetry import mixing_symmetry
from cloven.audit.slip.training import MOST_SEQUENCES, WINDOW, Budget, TooLittleTime, training_text
from cloven.audit.slip.transcripts import transcripts
from cloven.audit.slip.unscrambled_model import unscrambled_by_embeddings
from cloven.audit.slip.unscrambling import unscrambling
from cloven.audit.slip.weight_directions import weight_directions
from cloven.errors import RunError

Progress = Callable[[str, int, int], None]
ATTACKS: tuple[Callable[[Subject], list[Attack]], ...] = (
    exposed_half,
    null_space,
    unscrambling,
    unscrambled_by_embeddings,
    known_columns,
    mixing_symmetry,
    weight_directions,
    full_logits,
    plaintext_adjacency,
    transcripts,
    liars,
    lies_in_sessions,
)
ORDERING = 0.25  # of the time, for scrambles learned by gradient
_TOO_LARGE, _NO_SCRAMBLE = "its matrices are too large, or too few", "the bundle has no scramble"
NOT_TESTED = (
    "Training with more text, time or another recipe than the budget allows: raise --budget-minutes.",
    "Scrambles learned by gradient on matrices with more than 2,048 rows or columns, and matching on those with more than 4,096.",
    "Training on text that no black box gave, such as the model's own training data.",
    f"Training on more than {MOST_SEQUENCES * WINDOW:,} different tokens: with more time they are seen again.",
    "Attacks on the structure of the mixing itself, beyond those that it is built against (see the threat model).",
    "Places of mixed rows and columns, by magnitudes or graphs: there are none.",
    "A search for permutations from nothing: from two to four known columns a beam search finds the others (see the threat model).",
    "Two bundles of one model: they give the secret subspaces away (see the threat model).",
    "Rows of one group that belong together, such as a gate row and its partner among the up rows.",
    "Network attackers, stored pads, traffic analysis, and the host of the trusted machine.",
    "Side channels of the machines: timing, memory access, power.",
    "Public relatives of the model that nobody named with --relative.",
    "Secret fractions of models with more than 268 million parameters, and of fine-tunes whose base is not named: they have no curve.",
)


def audit_slip(
    out: Path,
    text: Tensor | None,
    *,
    seed: int,
    budget: Budget,
    relative: PreTrainedModel | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Findings:
    """Attack a bundle.

    Args:
        out: OUT of `cloven prepare slip`: both halves.
        text: int64 [windows, tokens] that perplexities are measured on; sampled from the model if None.
        seed: of the attackers' choices.
        budget: for all training runs together; of 0 seconds or steps: none.
        relative: a public relative of the model.
        progress: called with (stage, done, total).
    """
    assigned(torch.eye(1))  # where SciPy is missing, now and not in an hour
    progress("loading", 0, 1)
    subject = open_subject(out, text, seed, relative)
    parameters = {
        **subject.bundle.manifest.parameters,
        "scheme": subject.scheme,
        "bundle": subject.bundle.id,
        "seed": seed,
        **({"budget_minutes": budget.seconds / 60} if budget.steps is None else {"steps": budget.steps}),
        "text_tokens": int(subject.text.numel()),
        "text": "given" if text is not None else "sampled from the model",
        "text_sha256": hashlib.sha256(subject.text.numpy().tobytes()).hexdigest(),
        "cloven": version("cloven"),
        "torch": torch.__version__,
        "relative": relative.config.name_or_path if relative is not None else "none",
        "perplexity_of_the_model": round(math.exp(subject.nats), 4),
        **_kept(subject),
        "random": "pads of the recordings and questions to the worker are drawn anew"
        + ("; steps of training follow the machine's speed, unless --steps gives them" if budget.steps is None else ""),
    }
    attacks, skipped, failed = list[Attack](), list[str](), list[RunError]()
    for number, attack in enumerate(ATTACKS):
        progress("attacks", number, len(ATTACKS))
        name = attack.__name__.replace("_", " ").capitalize()
        try:
            found = attack(subject)
        except (RunError, OSError) as error:  # what the others found is not lost
            failed.append(RunError(f"{name}: {error}"))
            skipped.append(f"{name}: it failed: {error}")
            continue
        attacks += found
        if not found:
            skipped.append(f"{name}: {_why_not(subject, attack)}.")
    progress("curves", 0, 1)
    figures = [*spectra_figures(subject), *curve_over_fractions(subject)]
    if budget.seconds > 0 and budget.steps != 0:
        trained, learnt, curves, why = _training(subject, budget, progress)
        attacks, figures, skipped = [*attacks, *trained, *learnt], [*figures, *curves], [*skipped, *why]
    else:
        skipped.append("Recovery by training: it was switched off, by a budget of 0.")
    if knowledge(math.exp(subject.nats), subject) == 0.0:
        guess = math.exp(nothing(subject.text))
        skipped.append(
            f"What the exposed half knows of the text: the model's own perplexity on it, {math.exp(subject.nats):.4g}, is no better than "
            f"that of the tokens' frequencies, {guess:.4g}. Give a text that the model knows, or none."
        )
    shown = [_beside_the_base(subject, controlled(attack)) for attack in attacks]
    return Findings("slip", shown, figures, parameters, (*skipped, *NOT_TESTED), tuple(failed))


def _training(subject: Subject, budget: Budget, progress: Progress) -> tuple[list[Attack], list[Attack], list[Figure], list[str]]:
    """The attacks that train: recovery, learned scrambles, figures, and what was left out."""
    trained, learnt, curves, started = list[Attack](), list[Attack](), list[Figure](), time.monotonic()
    progress("sampling text to train on", 0, 1)
    try:
        text = training_text(subject, budget)
        left = replace(budget, seconds=max(0.0, budget.seconds - (time.monotonic() - started)))
        trained, curves = recovery(subject, text, left.part(1 - ORDERING), progress)
        learnt = learned_scramble(subject, text, left.part(ORDERING), progress)
    except TooLittleTime as why:
        what = "Learned scramble" if trained else "Recovery by training, and learned scramble"
        return trained, learnt, curves, [f"{what}: {why}; raise --budget-minutes."]
    without = [] if learnt else [f"Learned scramble: {_TOO_LARGE if subject.scrambled else _NO_SCRAMBLE}."]
    return trained, learnt, curves, without


def _kept(subject: Subject) -> dict[str, str]:
    """What of the weights the trusted half keeps."""
    ranks = [member.secret_a.shape[0] for group in subject.groups for member, _ in group.parts]
    summary = subject.bundle.manifest.summary
    exposed = {"of_the_fine_tune_exposed": f"{1 - summary['secret_energy']:.1%} of its energy"} if subject.origin == "public-base" else {}
    return {
        **exposed,
        "kept_secret": f"{summary['secret_fraction']:.2%} of the parameters, {summary['secret_energy']:.1%} of the energy",
        "exposed_whole": f"{ranks.count(0)} of {len(ranks)} matrices",
    }


def _why_not(subject: Subject, attack: Callable[[Subject], list[Attack]]) -> str:
    """Why an attack was not run."""
    if attack is mixing_symmetry and subject.scramble != "mixing":
        return "the bundle's scramble mixes nothing"
    if attack is weight_directions and subject.relative is None:
        return "no public relative was named (--relative MODEL)"
    if attack in (unscrambling, unscrambled_by_embeddings, known_columns, weight_directions) and not subject.scrambled:
        return _NO_SCRAMBLE
    if not any(len(member.secret_a) for group in subject.groups for member, _ in group.parts):
        return "nothing of the weights is secret"
    if attack is null_space and subject.origin != "private":
        return "the public base was not named (--relative MODEL)"
    return _TOO_LARGE


def _beside_the_base(subject: Subject, attack: Attack) -> Attack:
    """What a public base gives anybody is no break; who does not know the base cannot tell."""
    known = subject.origin == "private" or subject.relative is not None
    if known or attack.verdict != "broken" or not attack.name.startswith(("exposed_half", "recovery")):
        return attack
    return replace(attack, verdict="measured", metric=f"{attack.metric}; the public base may give as much: name it with --relative")
