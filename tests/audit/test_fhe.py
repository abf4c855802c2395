"""Division of ciphertexts: it fails on sanitised answers and gives every weight of answers that are only products."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from cloven.audit.fhe import divided, division, primes, quotient, residues, weights_of, with_residues
from cloven.private_lora.fhe import CIPHERTEXT_BYTES, DEGREE, KEY_BYTES, FheClient, rows_per_polynomial

seal = pytest.importorskip("seal")


def codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 48), (5, 1000), (2, DEGREE)])
def test_only_sanitised_answers_resist(rows: int, columns: int) -> None:
    assert divided(codes(rows, columns), False) == 1.0
    assert divided(codes(rows, columns), True) < 0.05 or rows * columns < 20


def test_the_attack_as_the_audit_reports_it() -> None:
    (attack,) = division(codes(3, 48))
    assert (attack.name, attack.scheme, attack.verdict, attack.weakened_value) == ("division", "private-lora/fhe", "holds", 1.0)
    assert attack.value < 0.05 and attack.chance == 1 / 255 and attack.tries == 3 * 48


def test_of_large_matrices_a_part_is_shown() -> None:
    (attack,) = division(codes(20, DEGREE + 100))
    assert attack.tries == 8 * DEGREE and attack.verdict == "holds" and attack.weakened_value == 1.0


def test_no_attack_where_seal_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seal", None)
    assert division(codes(3, 48)) == []


def test_weights_are_read_in_the_order_in_which_they_are_packed() -> None:
    w = codes(3, 1000).long()
    polynomial = np.zeros(DEGREE, np.int64)
    for i in range(3):
        for j in range(1000):
            polynomial[(i + 1) * 1000 - 1 - j] = w[i, j]
    assert rows_per_polynomial(1000) == 4
    assert torch.equal(weights_of(polynomial, 1000)[:3], w)


def test_a_ciphertexts_numbers_are_read_and_written() -> None:
    ciphertext = FheClient().query(torch.ones(4, dtype=torch.int32))[KEY_BYTES:]
    numbers = residues(ciphertext)
    assert len(ciphertext) == CIPHERTEXT_BYTES and numbers.shape == (2, 2, DEGREE)
    assert all(int(numbers[:, place].max()) < prime for place, prime in enumerate(primes()))
    assert with_residues(ciphertext, numbers) == ciphertext
    numbers[0, 0, 0] = 7
    assert residues(with_residues(ciphertext, numbers))[0, 0, 0] == 7
    assert with_residues(ciphertext, numbers, ntt=True) != with_residues(ciphertext, numbers)


def test_the_quotient_undoes_a_product() -> None:
    """(1 + 2X − 3X²)·c / c for a random c, by the definition of the negacyclic product."""
    prime = primes()[0]
    c = np.random.default_rng(0).integers(0, prime, DEGREE).astype(np.uint64)
    product = np.zeros(DEGREE, object)
    for power, factor in ((0, 1), (1, 2), (2, -3)):
        shifted = np.roll(c.astype(object), power)
        shifted[:power] *= -1  # X^N = −1
        product = (product + factor * shifted) % prime
    numbers = [np.zeros((2, 2, DEGREE), np.uint64) for _ in range(2)]
    numbers[0][1, 0], numbers[1][1, 0] = product.astype(np.uint64), c
    found = quotient(*numbers)
    assert found[:3].tolist() == [1, 2, -3] and not found[3:].any()
