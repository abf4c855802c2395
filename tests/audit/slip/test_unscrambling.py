from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from cloven.audit.slip import unscrambling as module
from cloven.audit.slip.scrambled import share_of
from cloven.audit.slip.unscrambling import _feeds, over_matrices, pairs_of, planted, residual_sides, unscrambling
from tests.audit.slip.subjects import demo_subject, named

COLUMNS = {f"unscramble_columns_by{what}_{how}" for what in ("", "_embeddings") for how in ("magnitudes", "graph", "eigenvectors")}


@pytest.mark.parametrize(
    ("precision", "layers"),
    [("int8", 1), pytest.param("int8", 2, marks=pytest.mark.long), pytest.param("int8x2", 2, marks=pytest.mark.long)],
)
def test_the_scramble_is_not_undone(precision: str, layers: int) -> None:
    """In the last layers, of four groups each, and the head."""
    subject = demo_subject(precision)
    found = unscrambling(replace(subject, groups=subject.groups[-4 * layers - 1 :]))
    mixed, permuted = named(found, "mixing"), named(found, "permutation")
    assert set(mixed) == {name for name in COLUMNS if name.endswith("eigenvectors")}  # there are no places to be matched
    rows = {"unscramble_rows_by_next_columns_magnitudes", "unscramble_rows_by_next_columns_graph"}
    assert set(permuted) == {*COLUMNS, *rows, "unscramble_lm_head_by_embeddings"}
    assert 0 < mixed["unscramble_columns_by_eigenvectors"].details["highest_share_of_the_16_top_directions"] < 0.6
    for attack in found:
        assert attack.value < 0.03, attack.name  # chance is 0.1 to 0.4 %
        assert attack.weakened_value >= (0.9 if "eigenvectors" in attack.name else 0.95), attack.name  # the planted near-duplicate
        assert attack.interval is not None and attack.interval[0] <= attack.value <= attack.interval[1]
        assert attack.details["highest_of_one_pair"] < 0.05


def test_a_bundle_that_permutes_is_attacked_as_it_is() -> None:
    subject = demo_subject(scramble="permutation")
    found = unscrambling(replace(subject, groups=subject.groups[-2:]))
    assert {attack.scheme for attack in found} == {"slip/int8, permutation"}


def test_one_pair_that_is_found_breaks_it() -> None:
    (attack,) = over_matrices(demo_subject(), "x", "A1", "share", [(0.0, 256)] * 9 + [(0.9, 256)], 1.0)
    assert attack.verdict == "broken" and attack.value == pytest.approx(0.09) and attack.details == {"highest_of_one_pair": 0.9}
    assert over_matrices(demo_subject(), "x", "A1", "share", [], 1.0) == []


def test_what_an_mlp_makes_is_read_by_its_last_matrix() -> None:
    pairs = [pair for pair in itertools.pairwise(demo_subject().groups) if _feeds(*pair)]
    assert len(pairs) == 5
    assert all(a.name.endswith("{gate_proj,up_proj}") and b.name.endswith("down_proj") for a, b in pairs)


def test_without_a_scramble_there_is_nothing_to_undo() -> None:
    assert unscrambling(demo_subject(scramble="none")) == []


def test_what_reads_and_writes_the_residual_stream() -> None:
    sides = residual_sides(demo_subject())
    assert len(sides) == 21 and all(side.basis.shape == (256, 256) == (side.matrix.shape[1], len(side.basis)) for side in sides)
    pairs = [(a.name, b.name) for a, b in pairs_of(sides)]
    assert len(pairs) == len(set(pairs)) >= 16
    first, last = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.{q_proj,k_proj,v_proj}"
    assert (first, last) in pairs and (first, "model.layers.1.mlp.down_proj") in pairs
    assert ("model.layers.4.mlp.{gate_proj,up_proj}", "lm_head") not in pairs[8:]  # neighbours that read come first, and once


@pytest.mark.parametrize("scramble", ["mixing", "permutation"])
def test_the_truth_about_a_side(scramble: str) -> None:
    """Turned by its basis, a side has the columns of the matrix in the model's order."""
    for side in residual_sides(demo_subject(scramble=scramble))[:4]:
        group = side.group
        assert group is not None
        n, c = group.sizes()
        flat = group.exposed / n[:, None] / c
        true = flat if side.name.endswith("_proj}") else flat.t()
        other = group.seen.rows if side.name.endswith("_proj}") else group.seen.columns
        turned = torch.linalg.solve(side.basis, torch.linalg.solve(other, side.matrix).t()).t()
        assert float(torch.nn.functional.cosine_similarity(turned, true, dim=0).min()) > 0.99


@pytest.mark.parametrize("mixed", [False, True])
def test_a_near_duplicate_and_its_truth(mixed: bool) -> None:
    matrix = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    for seen in planted(matrix, 1, mixed=mixed):
        back = torch.linalg.solve(seen.columns, torch.linalg.solve(seen.rows, seen.codes).t()).t()
        assert float(torch.nn.functional.cosine_similarity(back, matrix, dim=1).min()) > 0.9
    assert module.between(module.by_graph, *(module.columns_side(seen) for seen in planted(matrix, 1, mixed=False))) == 1.0


def test_shares() -> None:
    eye = torch.eye(4)
    assert share_of(torch.tensor([1, 0, 2, 3]), eye, eye[[1, 0, 2, 3]]) == 1.0
    assert share_of(torch.tensor([1, 0, 2, 3]), eye, -eye) == 0.5
    mixed = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    assert share_of(torch.arange(64), mixed, torch.eye(64)) < 0.1
