"""What the secret fraction buys: the exposed half's perplexity for fractions from 0.5 to 10 %, and the singular values with the secret
part marked.

Nothing is trained, the scramble is undone and nothing is quantised: what the secret part alone withholds.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator

import torch
from torch import Tensor

from cloven.audit.figure import Figure
from cloven.audit.slip.subject import Subject
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.decomposition import allocate_ranks, spectrum, split
from cloven.zoo.text import perplexity

FRACTIONS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
MOST_ENTRIES = 2**28  # of all matrices together: above, the curve would take hours
_POINTS = 200


@torch.no_grad()
def curve_over_fractions(subject: Subject) -> list[Figure]:
    """Perplexity of the exposed half against the secret fraction; none for large models."""
    weights = [group.weight(part) for group in subject.groups for part in range(len(group.parts))]
    if sum(weight.numel() for weight in weights) > MOST_ENTRIES:
        return []
    spectra = [spectrum(weight) for weight in weights]
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    stream = SecretStream(secrets.token_bytes(KEY_BYTES), "audit")
    points = []
    for fraction in FRACTIONS:
        ranks = allocate_ranks(spectra, shapes, fraction)
        exposed = iter([split(w, k, values, stream).exposed.float() for w, k, values in zip(weights, ranks, spectra, strict=True)])
        points.append((100 * fraction, _perplexity_with(subject, exposed)))
    whole = math.exp(subject.nats)
    series = {"exposed half, scramble undone": points, "the whole model": [(100 * fraction, whole) for fraction in FRACTIONS]}
    return [
        Figure(
            "fractions",
            "What the secret fraction buys",
            "secret fraction, % of the parameters",
            "perplexity",
            series,
            log_x=True,
            log_y=True,
        )
    ]


def _perplexity_with(subject: Subject, matrices: Iterator[Tensor]) -> float:
    return perplexity(subject.with_matrices(lambda group, part: next(matrices)), subject.text)


@torch.no_grad()
def spectra_figure(subject: Subject) -> list[Figure]:
    """The singular values of the matrix with most secret directions, with the place from which on they are exposed."""
    group, part = max(
        ((group, part) for group in subject.groups for part in range(len(group.parts))),
        key=lambda at: at[0].parts[at[1]][0].secret_a.shape[0],
    )
    member, rows = group.parts[part]
    k = member.secret_a.shape[0]
    if not k:
        return []
    series = {}
    for name, matrix in (("the model's", group.weight(part)), ("the exposed half's", group.exposed[rows])):
        values = spectrum(matrix)
        series[name] = [(float(i + 1), float(values[i])) for i in range(0, len(values), max(1, len(values) // _POINTS))]
    return [Figure("spectra", f"Singular values of {member.name}", "number", "singular value", series, log_y=True, mark=k + 0.5)]
