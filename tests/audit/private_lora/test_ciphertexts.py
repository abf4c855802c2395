from __future__ import annotations

import numpy as np
import pytest
import torch

from cloven.audit.private_lora.ciphertexts import primes, quotient, residues, with_residues
from cloven.private_lora.fhe import CIPHERTEXT_BYTES, DEGREE, KEY_BYTES, FheClient

seal = pytest.importorskip("seal")


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
