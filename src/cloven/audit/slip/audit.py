"""All attacks on a SLIP bundle."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.audit.attack import Attack, controlled
from cloven.audit.findings import Findings
from cloven.audit.slip.exposed_half import exposed_half, knowledge, nothing
from cloven.audit.slip.fractions import curve_over_fractions, spectra_figure
from cloven.audit.slip.full_logits import full_logits
from cloven.audit.slip.known_columns import known_columns
from cloven.audit.slip.learned_scramble import learned_scramble
from cloven.audit.slip.liars import liars
from cloven.audit.slip.matching import assigned
from cloven.audit.slip.null_space import null_space
from cloven.audit.slip.plaintext_adjacency import plaintext_adjacency
from cloven.audit.slip.recovery import recovery
from cloven.audit.slip.subject import Subject, open_subject
from cloven.audit.slip.training import MOST_SEQUENCES, WINDOW, training_text
from cloven.audit.slip.transcripts import transcripts
from cloven.audit.slip.unscrambling import unscrambling
from cloven.audit.slip.weight_directions import weight_directions

Progress = Callable[[str, int, int], None]
ATTACKS: tuple[Callable[[Subject], list[Attack]], ...] = (
    exposed_half,
    null_space,
    unscrambling,
    known_columns,
    weight_directions,
    full_logits,
    plaintext_adjacency,
    transcripts,
    liars,
)
ORDERING = 0.25  # of the time, for scrambles learned by gradient
NOT_TESTED = (
    "Training with more text, time or another recipe than the budget allows: raise --budget-minutes.",
    "Scrambles learned by gradient on matrices with more than 2,048 rows or columns, and matching on those with more than 4,096.",
    "Training on text that no black box gave, such as the model's own training data.",
    f"Training on more than {MOST_SEQUENCES * WINDOW:,} different tokens: with more time they are seen again.",
    "Attacks on the structure of the mixing itself, beyond the one that its secret sizes answer (see the threat model).",
    "Places of mixed rows and columns, by magnitudes, graphs or full logits: there are none.",
    "A search for permutations from nothing: from two to four known columns a beam search finds the others (see the threat model).",
    "Two bundles of one model: they give the secret subspaces away (see the threat model).",
    "Rows of one group that belong together, such as a gate row and its partner among the up rows.",
    "Network attackers, stored pads, traffic analysis, and the host of the trusted machine.",
    "Side channels of the machines: timing, memory access, power.",
    "Public relatives of the model that nobody named with --relative.",
)


def audit_slip(
    out: Path,
    text: Tensor | None,
    *,
    seed: int,
    minutes: float,
    relative: PreTrainedModel | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Findings:
    """Attack a bundle.

    Args:
        out: OUT of `cloven prepare slip`: both halves.
        text: int64 [windows, tokens] that perplexities are measured on; sampled from the model if None.
        seed: of the attackers' choices.
        minutes: for all training runs together.
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
        "budget_minutes": minutes,
        "text_tokens": int(subject.text.numel()),
        "text": "given" if text is not None else "sampled from the model",
        "text_sha256": hashlib.sha256(subject.text.numpy().tobytes()).hexdigest(),
        "cloven": version("cloven"),
        "torch": torch.__version__,
        "relative": relative.config.name_or_path if relative is not None else "none",
        "perplexity_of_the_model": round(math.exp(subject.nats), 4),
        "random": "pads of the recordings and questions to the worker are drawn anew; steps of training follow the machine's speed",
    }
    attacks, skipped = list[Attack](), list[str]()
    for number, attack in enumerate(ATTACKS):
        progress("attacks", number, len(ATTACKS))
        found = attack(subject)
        attacks += found
        if not found:
            name = attack.__name__.replace("_", " ").capitalize()
            skipped.append(f"{name}: not for this bundle (no relative was named, say), or its matrices are too large.")
    progress("curves", 0, 1)
    figures = [*spectra_figure(subject), *curve_over_fractions(subject)]
    if minutes > 0:
        progress("sampling text to train on", 0, 1)
        started = time.monotonic()
        text_to_train_on = training_text(subject)
        seconds = max(0.0, 60 * minutes - (time.monotonic() - started))
        trained, curves = recovery(subject, text_to_train_on, (1 - ORDERING) * seconds, progress)
        attacks += trained + learned_scramble(subject, text_to_train_on, ORDERING * seconds, progress)
        figures += curves
    else:
        skipped.append("Recovery by training: --budget-minutes 0.")
    if knowledge(math.exp(subject.nats), subject) == 0.0:
        guess = math.exp(nothing(subject.text))
        skipped.append(
            f"What the exposed half knows of the text: the model's own perplexity on it, {math.exp(subject.nats):.4g}, is no better than "
            f"that of the tokens' frequencies, {guess:.4g}. Give a text that the model knows, or none."
        )
    return Findings("slip", [controlled(attack) for attack in attacks], figures, parameters, (*skipped, *NOT_TESTED))
