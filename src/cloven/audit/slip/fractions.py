"""What the secret fraction buys: the exposed half's perplexity for fractions from 0.5 to 10 %, and the singular values with the secret
part marked.

Nothing is trained, the scramble is undone and nothing is quantised: what the secret part alone withholds. In its place: zero, a random
part of the same size, or a public relative's own; each with embeddings and norms given, and without. Of a fine-tune whose public base is
named: the base with what lies beyond the secret rank of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.audit.figure import Figure
from cloven.audit.slip.exposed_half import random_secret, relatives_secret, without_gifts
from cloven.audit.slip.null_space import without_top
from cloven.audit.slip.subject import AttackedGroup, Subject
from cloven.slip.decomposition import allocate_ranks, spectrum, split
from cloven.zoo.text import perplexity

FRACTIONS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
MOST_ENTRIES = 2**28  # of all matrices together: above, the curve would take hours
_POINTS = 200
_KINDS = 4  # of matrices whose singular values are shown


@torch.no_grad()
def curve_over_fractions(subject: Subject) -> list[Figure]:
    """Perplexity of the exposed half against the secret fraction.

    None for large models, nor where the secret is a difference from a base that is not named, or exactly an adapter.
    """
    if subject.origin != "private" and (subject.origin != "public-base" or subject.relative is None):
        return []
    weights = [group.weight(part) for group in subject.groups for part in range(len(group.parts))]
    if sum(weight.numel() for weight in weights) > MOST_ENTRIES:
        return []
    members = [member for group in subject.groups for member, _ in group.parts]
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    if subject.origin == "public-base":
        return [_of_a_fine_tune(subject, weights, [subject.relative_weight(member) for member in members], shapes)]
    spectra = [spectrum(weight) for weight in weights]
    stream = subject.stream("fractions")
    series: dict[str, list[tuple[float, float]]] = {}
    for fraction in FRACTIONS:
        ranks = allocate_ranks(spectra, shapes, fraction)
        parts = [split(w, k, values, stream) for w, k, values in zip(weights, ranks, spectra, strict=True)]
        exposed, random = [part.exposed.float() for part in parts], subject.random("fractions")
        fillings = {
            "zero in the secret's place": exposed,
            "a random part": [random_secret(part.exposed, part.secret_b, part.secret_a, random).float() for part in parts],
        }
        if subject.relative is not None:
            public = [subject.relative_weight(member) for member in members]
            own = [relatives_secret(e, k, w) for e, k, w in zip(exposed, ranks, public, strict=True)]
            fillings["the relative's own part"] = own
        for name, matrices in fillings.items():
            model = _with(subject, matrices)
            for which, one in ((name, model), (f"{name}; no gifts", without_gifts(model, subject))):
                series.setdefault(which, []).append((100 * fraction, perplexity(one, subject.text)))
    whole = math.exp(subject.nats)
    series["the whole model"] = [(100 * fraction, whole) for fraction in FRACTIONS]
    return [
        Figure(
            "fractions",
            "What the secret fraction buys",
            "secret fraction, % of the parameters",
            "perplexity",
            series,
            log_x=True,
            log_y=True,
            note="The exposed half alone, for other secret fractions: not trained, not quantised, scramble undone. Higher is safer; what "
            "training makes of it is another figure.",
        )
    ]


def _of_a_fine_tune(subject: Subject, weights: list[Tensor], bases: list[Tensor], shapes: list[tuple[int, int]]) -> Figure:
    changes = [weight - base for weight, base in zip(weights, bases, strict=True)]
    spectra, points = [spectrum(change) for change in changes], list[tuple[float, float]]()
    for fraction in FRACTIONS:
        ranks = allocate_ranks(spectra, shapes, fraction)
        exposed = [base + without_top(change, k).float() for base, change, k in zip(bases, changes, ranks, strict=True)]
        points.append((100 * fraction, perplexity(_with(subject, exposed), subject.text)))
    assert subject.relative is not None
    flat = {"the public base": perplexity(subject.relative, subject.text), "the whole model": math.exp(subject.nats)}
    series = {"the exposed half": points} | {name: [(100 * fraction, y) for fraction in FRACTIONS] for name, y in flat.items()}
    note = "A fine-tune's exposed half, with its embeddings and norms, for other secret fractions. Nearer to the base's is safer."
    x, y = "secret fraction, % of the parameters", "perplexity"
    return Figure("fractions", "What the secret fraction buys", x, y, series, log_x=True, log_y=True, note=note)


def _with(subject: Subject, matrices: Sequence[Tensor]) -> PreTrainedModel:
    following = iter(matrices)
    return subject.with_matrices(lambda group, part: next(following))


@torch.no_grad()
def spectra_figures(subject: Subject) -> list[Figure]:
    """The singular values of some matrices, with the place from which on they are exposed: of each kind the one with most secret
    directions, of the kinds with most of them."""
    parts = [(group, part) for group in subject.groups for part in range(len(group.parts))]
    parts.sort(key=lambda at: -len(at[0].parts[at[1]][0].secret_a))
    kinds = dict[str, tuple[AttackedGroup, int]]()
    for group, part in parts:
        kinds.setdefault(group.parts[part][0].name.rpartition(".")[2], (group, part))
    return [
        _spectra(group, part, f"spectra_{kind}")
        for kind, (group, part) in list(kinds.items())[:_KINDS]
        if len(group.parts[part][0].secret_a)
    ]


def _spectra(group: AttackedGroup, part: int, name: str) -> Figure:
    member, rows = group.parts[part]
    series = {}
    for which, matrix in (("the model's", group.weight(part)), ("the exposed half's", group.exposed[rows])):
        values = spectrum(matrix)
        series[which] = [(float(i + 1), float(f"{float(values[i]):.3g}")) for i in range(0, len(values), max(1, len(values) // _POINTS))]
    mark, title = len(member.secret_a) + 0.5, f"Singular values of {member.name}"
    note = "Shaded: the secret part; of its kind, the matrix that keeps most. In the exposed half a decoy of random values takes its place."
    return Figure(name, title, "number", "singular value", series, log_y=True, mark=mark, note=note)
