"""Two bundles of one model break the decoy: the reason why a model is prepared once.

Each preparation draws another decoy for the same secret subspaces, so that E₁ − E₂ = (B₂ − B₁) V_kᵀ has rank k and the row space of the
secret. The attacker here has both exposed matrices aligned; of permuted ones a real one gets that from sorted rows and columns, without
any key, because both hold nearly the same numbers; of mixed ones nobody has shown it, and nobody should rely on that. This is a stated
limit (docs/threat-model.md), not something that the split withstands.
"""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.decomposition import spectrum, split
from tests.split_models import demo_model

RANK = 12


def stream() -> SecretStream:
    return SecretStream(secrets.token_bytes(KEY_BYTES), "test")


def weight() -> Tensor:
    value = demo_model().get_submodule("model.layers.2.mlp.gate_proj").weight
    assert isinstance(value, Tensor)
    return value.detach().double()


def overlap(candidate: Tensor, w: Tensor) -> float:
    """Share of the secret row space V_k in the span of the candidate's rows."""
    secret = torch.linalg.svd(w, full_matrices=False)[2][:RANK]
    return float((candidate @ secret.t()).square().sum() / RANK)


def top_rows(matrix: Tensor) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[2][:RANK]


def test_the_difference_of_two_bundles_is_the_secret_row_space() -> None:
    w = weight()
    first, second = (split(w, RANK, spectrum(w), stream()).exposed for _ in range(2))
    assert overlap(top_rows(first - second), w) > 0.999


def test_one_bundle_and_another_matrix_are_not_enough() -> None:
    w = weight()
    exposed = split(w, RANK, spectrum(w), stream()).exposed
    other = demo_model().get_submodule("model.layers.3.mlp.gate_proj").weight
    assert isinstance(other, Tensor)
    assert overlap(top_rows(exposed), w) < 0.3
    assert overlap(top_rows(exposed - other.detach().double()), w) < 0.3
