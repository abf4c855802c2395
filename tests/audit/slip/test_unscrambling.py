from __future__ import annotations

import itertools

import pytest
import torch

from cloven.audit.slip.unscrambling import _feeds, hits, near_duplicate, residual_groups, unscrambling
from tests.audit.slip.subjects import demo_subject, named


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
def test_the_scramble_is_not_undone(precision: str) -> None:
    found = named(unscrambling(demo_subject(precision)))
    assert set(found) == {
        "unscramble_columns_by_magnitudes",
        "unscramble_columns_by_graph",
        "unscramble_columns_by_embeddings",
        "unscramble_columns_by_embeddings_graph",
        "unscramble_rows_by_next_columns",
        "unscramble_columns_from_known",
        "unscramble_lm_head_by_embeddings",
    }
    known = found["unscramble_columns_from_known"]
    assert known.value > 0.3 and known.adversary == "A1, who knows 16 of 256 columns"  # a few give many away: measured, not hidden
    for name, attack in found.items():
        assert attack.value < 0.03 or attack is known, name  # chance is 0.1 to 0.4 %
        assert attack.weakened_value >= 0.95, name  # the planted near-duplicate
        assert attack.interval is not None and attack.interval[0] <= attack.value <= attack.interval[1]


def test_what_an_mlp_makes_is_read_by_its_last_matrix() -> None:
    pairs = [pair for pair in itertools.pairwise(demo_subject().groups) if _feeds(*pair)]
    assert len(pairs) == 5
    assert all(a.name.endswith("{gate_proj,up_proj}") and b.name.endswith("down_proj") for a, b in pairs)


def test_without_a_scramble_there_is_nothing_to_undo() -> None:
    assert unscrambling(demo_subject(scramble=False)) == []


def test_groups_of_the_residual_stream() -> None:
    names = [group.name for group in residual_groups(demo_subject())]
    assert len(names) == 11 and "lm_head" in names[-1] and not any("o_proj" in name or "down_proj" in name for name in names)


def test_a_near_duplicates_places() -> None:
    matrix = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    codes, rows, columns = near_duplicate(matrix, 1)
    back = torch.empty_like(codes)
    back[rows[:, None], columns[None]] = codes
    assert float(torch.nn.functional.cosine_similarity(back.abs(), matrix.abs(), dim=1).min()) > 0.95
    assert hits(torch.tensor([1, 0]), torch.tensor([5, 6]), torch.tensor([6, 5])) == 1.0
