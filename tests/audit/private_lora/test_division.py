"""Division of ciphertexts: it fails on sanitised answers and gives every weight of answers that are only products."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from cloven.audit.private_lora.division import divided, division, weights_of
from cloven.audit.private_lora.subject import Target
from cloven.masks.lwe_parameters import lwe_parameters
from cloven.private_lora.fhe import DEGREE, rows_per_polynomial
from cloven.private_lora.manifest import ClientGroup
from tests.audit.private_lora.targets import codes_of

seal = pytest.importorskip("seal")


def holding(rows: int, columns: int) -> Target:
    """A target of which only W is looked at."""
    parameters = lwe_parameters("lwe")
    matrix = torch.nn.functional.pad(codes_of(rows, columns), (parameters.pad_columns, 0))
    return Target(matrix, torch.empty(0), ClientGroup(columns, 1, ()), parameters, 16, 1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 48), (5, 1000), (2, DEGREE)])
def test_only_sanitised_answers_resist(rows: int, columns: int) -> None:
    assert divided(codes_of(rows, columns), False) == 1.0
    assert divided(codes_of(rows, columns), True) < 0.05 or rows * columns < 20


def test_the_attack_as_the_audit_reports_it() -> None:
    (attack,) = division(holding(3, 48))
    assert (attack.name, attack.scheme, attack.verdict, attack.weakened_value) == ("division", "private-lora/fhe", "holds", 1.0)
    assert attack.value < 0.05 and attack.chance == 1 / 255 and attack.tries == 3 * 48


def test_of_large_matrices_a_part_is_shown() -> None:
    (attack,) = division(holding(20, DEGREE + 100))
    assert attack.tries == 8 * DEGREE and attack.verdict == "holds" and attack.weakened_value == 1.0


def test_no_attack_where_seal_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seal", None)
    assert division(holding(3, 48)) == []


def test_weights_are_read_in_the_order_in_which_they_are_packed() -> None:
    w = codes_of(3, 1000).long()
    polynomial = np.zeros(DEGREE, np.int64)
    for i in range(3):
        for j in range(1000):
            polynomial[(i + 1) * 1000 - 1 - j] = w[i, j]
    assert rows_per_polynomial(1000) == 4
    assert torch.equal(weights_of(polynomial, 1000)[:3], w)
