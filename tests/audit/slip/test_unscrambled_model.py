from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cloven.audit.slip import unscrambled_model as module
from cloven.audit.slip.unscrambled_model import agreeing, into, unscrambled_by_embeddings
from tests.audit.slip.subjects import demo_subject, named, tiny_subject


def skewed(rows: int, columns: int) -> Tensor:
    """Columns of different sizes, none of them symmetric: float32 [rows, columns]."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=random).exp() * torch.linspace(1, 9, columns)


@pytest.mark.parametrize("mixed", [True, False])
def test_the_same_matrix_in_a_secret_basis_is_brought_back(mixed: bool) -> None:
    table, random = skewed(4000, 12), torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=random))[0]
    if not mixed:
        basis = torch.eye(12)[torch.randperm(12, generator=random)] * torch.where(torch.rand(12, generator=random) < 0.5, -1.0, 1.0)
    found = into(table @ basis, table, mixed=mixed)
    assert torch.allclose(found, table, atol=1e-2)
    assert not torch.allclose(table @ basis, table, atol=1)


def test_third_moments_tell_which_way_a_vector_points() -> None:
    one = skewed(500, 6)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
    assert torch.equal(agreeing(one * signs, one), signs)


def test_nothing_public_buys_nothing_and_a_near_duplicate_all() -> None:
    found = unscrambled_by_embeddings(demo_subject())
    assert {attack.name for attack in found} == {"unscrambled_by_embeddings"}
    for scramble in ("mixing", "permutation"):
        attack = named(found, scramble)["unscrambled_by_embeddings"]
        assert attack.verdict == "holds" and attack.value < 0.02 and attack.weakened_value > 0.95
        assert attack.details["perplexity"] > 300 and "21 of 21 groups" in attack.metric


def test_who_names_the_right_basis_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack's own path succeeds where the matcher does: here it is told the model's columns, of matrices that hold all."""
    subject = demo_subject(scramble="permutation")
    plain = iter([side.matrix for side in module.residual_sides(subject)])
    truth = iter([side.basis for side in module.residual_sides(subject)])
    seen = []

    def told(matrix: Tensor, table: Tensor, *, mixed: bool) -> Tensor:
        assert torch.equal(matrix, next(plain)) and table.shape[1] == matrix.shape[1]
        seen.append(mixed)
        return matrix @ next(truth)

    monkeypatch.setattr(module, "into", told)
    monkeypatch.setattr(module, "compared", lambda one: [one])
    (attack,) = unscrambled_by_embeddings(subject)
    assert len(seen) == 21 and not any(seen)
    assert attack.details["perplexity"] != attack.details["perplexity_as_they_lie"]


def test_without_a_scramble_there_is_nothing_to_undo() -> None:
    assert unscrambled_by_embeddings(replace(tiny_subject(), scramble="none")) == []
