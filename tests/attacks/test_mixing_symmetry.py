"""The second moment of the codes, on cloven's own earlier scrambles and on the one that answers the attack.

Two rounds with sizes, and three with the sizes right behind the outermost transform: from the codes alone the attack finds a symmetry, and
knows that it is right. Three with the sizes one transform further inside: nothing is found.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cloven.audit.slip.scrambled import coarse
from cloven.audit.slip.symmetry import SURE, labels_of, share_of_symmetry, symmetry, two_rounds
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip import exposed_matrix
from cloven.slip.exposed_matrix import expose
from cloven.slip.mixing import COLUMNS, ROWS

NARROW, LONG, TRIES = 256, 4096, 6


def coin() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=coin(), dtype=torch.float64)


def test_two_rounds_are_seen_in_the_codes() -> None:
    vectors, labels = two_rounds(2048, coin())
    p, value = symmetry(vectors, coin(), TRIES)
    assert value > 2 * SURE and share_of_symmetry(p, labels) > 0.95


def seen(shape: tuple[int, int]) -> tuple[float, float]:
    """What the attack finds on the narrow side of an exposed Gaussian matrix: (share of the key, its own certainty)."""
    made = expose(gaussian(*shape), 1, SecretStream(bytes(KEY_BYTES), "codes alone"), mixed=True)
    rows, columns = labels_of(made)
    vectors, labels = (coarse(made).t(), columns) if shape[0] > shape[1] else (coarse(made), rows)
    p, value = symmetry(vectors, coin(), TRIES)
    return share_of_symmetry(p, labels), value


SHAPES = pytest.mark.parametrize("shape", [(LONG, NARROW), (NARROW, LONG)], ids=["columns", "rows"])


@SHAPES
def test_sizes_in_the_wrong_round_are_seen_too(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds, with what is right for rows on columns, and the other way round: sizes lie right behind the outermost transform."""
    monkeypatch.setattr(exposed_matrix, "COLUMNS", ROWS)
    monkeypatch.setattr(exposed_matrix, "ROWS", COLUMNS)
    share, value = seen(shape)
    assert value > SURE and share > 0.95


@SHAPES
def test_the_scramble_shows_nothing(shape: tuple[int, int]) -> None:
    share, value = seen(shape)
    assert value < 0.12 and share < 0.06
