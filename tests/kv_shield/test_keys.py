from __future__ import annotations

import secrets

import pytest
import torch
from torch import Tensor

from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.kv_shield.keys import CONDITION, permutations, session_keys

G, D = 3, 28


def stream() -> SecretStream:
    return SecretStream(secrets.token_bytes(KEY_BYTES), "test")


def test_permutations() -> None:
    drawn = permutations(stream(), 5, 64)
    assert drawn.shape == (5, 64) and drawn.dtype == torch.int64
    assert torch.equal(drawn.sort(1).values, torch.arange(64).expand(5, 64))
    assert len({tuple(row.tolist()) for row in drawn}) == 5  # one per head


def test_every_place_is_equally_likely() -> None:
    counts = torch.zeros(6, 6)
    draws = permutations(stream(), 6000, 6)
    for place in range(6):
        counts[place] = torch.bincount(draws[:, place], minlength=6)
    assert float((counts - 1000).abs().max()) < 200  # σ = 29


@pytest.mark.parametrize("size", [4, D, 80, 144])
def test_condition(size: int) -> None:
    keys = session_keys(stream(), 4, size)
    for matrix, inverse in ((keys.k, keys.k_inverse), (keys.v, keys.v_inverse)):
        assert matrix.shape == inverse.shape == (4, size, size) and matrix.dtype == torch.float32
        assert float(torch.linalg.cond(matrix.double()).max()) <= CONDITION + 0.01
        assert float((matrix.double() @ inverse.double() - torch.eye(size)).abs().max()) < 1e-5


def test_the_condition_is_used() -> None:
    # log-uniform singular values: near-orthogonal keys would keep every norm, which the norm attack reads
    conditions = torch.linalg.cond(session_keys(stream(), 8, D).k.double())
    assert float(conditions.min()) > 3


def test_all_keys_differ() -> None:
    one = stream()
    keys = [session_keys(one, G, D) for _ in range(2)]
    matrices = [matrix for key in keys for tensor in (key.k, key.v) for matrix in tensor]
    for i, a in enumerate(matrices):
        for b in matrices[:i]:
            assert correlation(a, b) < 0.3


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs())


def test_scores_and_sums_survive() -> None:
    keys = session_keys(stream(), 1, D)
    q, k, v = (torch.randn(7, 12) for _ in range(3))
    noise = torch.randn(2, 7, D - 12)
    zeros = torch.zeros(7, D - 12)
    keyed_k = torch.cat([k, noise[0]], 1) @ keys.k[0]
    keyed_q = torch.cat([q, zeros], 1) @ keys.k_inverse[0].T
    assert torch.allclose(keyed_q @ keyed_k.T, q @ k.T, atol=1e-4)
    p = torch.softmax(q @ k.T, -1)
    keyed_a = p @ (torch.cat([v, noise[1]], 1) @ keys.v[0])
    assert torch.allclose((keyed_a @ keys.v_inverse[0])[:, :12], p @ v, atol=1e-4)


def test_repr_shows_nothing() -> None:
    assert repr(session_keys(stream(), 1, 4)) == "SessionKeys(<secret>)"
