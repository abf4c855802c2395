from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cloven.audit.slip.hadamard import both_sides, hadamard, seen, transform
from tests.audit.slip.subjects import demo_subject, named, tiny_subject


@pytest.mark.parametrize("columns", [1, 2, 8, 12, 7, 96])
def test_the_transform_is_orthogonal_and_its_own_inverse(columns: int) -> None:
    x = torch.randn(5, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    assert torch.allclose(transform(transform(x)), x) and torch.allclose(transform(x).norm(dim=1), x.norm(dim=1))
    assert torch.allclose(both_sides(both_sides(x)), x)


def test_it_is_hadamards_matrix() -> None:
    h = transform(torch.eye(4)) * 2
    assert set(h.flatten().tolist()) == {1.0, -1.0} and torch.equal(h @ h.t(), 4 * torch.eye(4))
    assert torch.equal(transform(torch.eye(6)) * 2**0.5 != 0, torch.block_diag(*[torch.ones(2, 2)] * 3) != 0)


def test_what_is_left_when_it_is_undone() -> None:
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    left, rows, columns = seen(matrix, tiny_subject().stream("x"))
    back = torch.empty_like(left)
    back[rows[:, None], columns[None]] = left
    assert float(torch.nn.functional.cosine_similarity(back.abs(), matrix.abs(), dim=1).mean()) > 0.9


def test_it_hides_as_much_as_permutations_alone() -> None:
    found = named(hadamard(demo_subject()))
    assert set(found) == {f"unscramble_hadamard_by_{how}" for how in ("magnitudes", "graph", "embeddings")}
    for attack in found.values():
        assert attack.verdict == "holds" and attack.weakened_value >= 0.95
        assert attack.interval is not None and attack.interval[0] <= attack.value <= attack.interval[1]


def test_without_a_scramble_there_is_no_question() -> None:
    assert hadamard(demo_subject(scramble=False)) == [] and hadamard(replace(demo_subject(), groups=demo_subject().groups[:1])) == []
