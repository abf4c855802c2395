"""The single attacks, on small tables with planted answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cloven.audit.kv_shield import (
    BLOCK,
    MODES,
    audit_kv_shield,
    by_gram,
    by_known_plaintext,
    by_norms,
    by_sorting,
    by_table,
    column_spaces,
    equal_pairs,
    layer0_of,
    match_rows,
    shared_spaces,
    snapshot,
)
from cloven.model.cache_argument import with_cache
from tests.split_models import tiny

TOKENS, HEADS, D, NOISE = 50, 2, 8, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table() -> Tensor:
    """[N, G, d]."""
    return torch.randn(TOKENS, HEADS, D, generator=generator())


def text(count: int = 64, vocabulary: int = TOKENS) -> Tensor:
    return torch.randint(0, vocabulary, (count,), generator=generator(1))


def hits(guesses: Tensor, truth: Tensor) -> float:
    return float((guesses == truth).double().mean())


def permuted(rows: Tensor) -> Tensor:
    return torch.stack([rows[:, head, torch.randperm(D, generator=generator(head))] for head in range(HEADS)], 1)


def rotated(rows: Tensor) -> Tensor:
    q = torch.stack([torch.linalg.qr(torch.randn(D, D, generator=generator(head)))[0] for head in range(HEADS)])
    return torch.einsum("tgd,gde->tge", rows, q)


def mixed(rows: Tensor, noise: int = NOISE, seed: int = 5) -> Tensor:
    """One invertible matrix per head on rows with noise behind them."""
    wide = torch.cat([rows, torch.randn(*rows.shape[:2], noise, generator=generator(seed))], -1)
    return torch.einsum("tgd,gde->tge", wide, torch.randn(HEADS, D + noise, D + noise, generator=generator(seed + 1)))


def test_table_reads_plain_rows_and_no_permuted_ones() -> None:
    rows = table()[text()]
    assert hits(by_table(rows + 0.01, table()), text()) == 1
    assert hits(by_table(permuted(rows), table()), text()) < 0.3


def test_sorting_undoes_permutations_and_no_rotations() -> None:
    rows = table()[text()]
    assert hits(by_sorting(permuted(rows), table()), text()) == 1
    assert hits(by_sorting(rotated(rows), table()), text()) < 0.4
    assert by_sorting(mixed(rows), table()).shape == text().shape  # wider rows


def test_norms_undo_rotations_and_no_invertible_matrices() -> None:
    rows = table()[text()]
    assert hits(by_norms(rotated(rows), table()), text()) >= 0.95
    assert hits(by_norms(mixed(rows), table()), text()) < 0.3


def test_gram_finds_the_last_token_of_every_block() -> None:
    rows, last = table()[text()], text()[BLOCK - 1 :: BLOCK]
    assert torch.equal(by_gram(rotated(rows), table(), text()), last)
    assert hits(by_gram(torch.randn(rows.shape, generator=generator(9)), table(), text()), last) < 1


def test_gram_leaves_a_block_that_is_not_whole() -> None:
    tokens = text(2 * BLOCK + 3)
    assert by_gram(table()[tokens], table(), tokens).shape == (2,)


def test_known_plaintext_needs_as_many_tokens_as_the_rows_are_wide() -> None:
    tokens = torch.randperm(TOKENS, generator=generator(3))
    rows = mixed(table()[tokens])
    full = D + NOISE
    assert hits(by_known_plaintext(rows, table(), tokens, full + 2), tokens[full + 2 :]) >= 0.95
    assert hits(by_known_plaintext(rows, table(), tokens, 3), tokens[3:]) < 0.3


def test_known_plaintext_of_an_orthogonal_key_needs_d_only() -> None:
    tokens = torch.randperm(TOKENS, generator=generator(3))
    assert hits(by_known_plaintext(rotated(table()[tokens]), table(), tokens, D + 1), tokens[D + 1 :]) >= 0.95


def test_equal_pairs_show_through_every_key() -> None:
    tokens = text(64, 12)
    rows = table()[tokens]
    assert equal_pairs(column_spaces(rows), tokens) == 1
    assert equal_pairs(column_spaces(mixed(rows, 0)), tokens) == 1  # without noise
    assert equal_pairs(column_spaces(torch.randn(rows.shape, generator=generator(8))), tokens) < 0.3


def test_no_equal_pairs_no_score() -> None:
    tokens = torch.arange(20)
    assert equal_pairs(column_spaces(table()[tokens]), tokens) == 0


def test_column_spaces_do_not_depend_on_the_key() -> None:
    rows = table()[text()]
    for a, b in zip(column_spaces(rows), column_spaces(mixed(rows, 0)), strict=True):
        assert torch.allclose(a @ a.t(), b @ b.t(), atol=1e-4)
        assert torch.allclose(a.t() @ a, torch.eye(D, dtype=torch.float64), atol=1e-9)


def test_two_snapshots_share_what_is_no_noise() -> None:
    rows = table()[text()]
    shared = shared_spaces(column_spaces(mixed(rows, seed=5)), column_spaces(mixed(rows, seed=7)), D)
    for found, true in zip(shared, column_spaces(rows), strict=True):
        assert torch.allclose(found @ found.t(), true @ true.t(), atol=1e-4)


def test_rows_of_weights_are_matched_within_their_head() -> None:
    public = torch.randn(HEADS * D, 30, generator=generator())
    order = torch.cat([torch.randperm(D, generator=generator(head)) + D * head for head in range(HEADS)])
    assert torch.equal(match_rows(public[order] + 1e-3, public, HEADS), order)
    assert hits(match_rows(torch.randn(HEADS * D, 30, generator=generator(4)), public, HEADS), order) < 0.6


@pytest.mark.parametrize("mode", MODES)
def test_snapshots_are_what_a_cache_of_the_mode_holds(mode: str) -> None:
    rows = table()[text()]
    seen, again = snapshot(mode, rows, NOISE), snapshot(mode, rows, NOISE)
    assert seen.shape == (*rows.shape[:2], D + NOISE if mode == "session" else D)
    assert torch.equal(seen, rows) == (mode == "none")
    assert torch.equal(seen, again) == (mode == "none")  # fresh keys every time
    if mode in ("none", "permute"):
        assert torch.equal(seen.sort(-1).values, rows.sort(-1).values)
    if mode == "session":  # plain rows are in the span, without their noise they are not all of it
        for head in range(HEADS):
            both = torch.linalg.matrix_rank(torch.cat([seen[:, head], rows[:, head]], 1).double(), rtol=1e-5)
            assert int(both) == D + NOISE
    if mode == "sealed":
        assert float(seen.abs().max()) <= 1 and abs(float(seen.mean())) < 0.1 and abs(float(seen.std()) - 3**-0.5) < 0.05


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt2"])
def test_layer_0_depends_on_the_token_alone(family: str) -> None:
    """The table is what layer 0 makes of a text, whatever stands around: but for GPT-2, whose positions are added before."""
    from transformers import DynamicCache

    model = tiny(family)
    layer = layer0_of(model)
    ids = torch.randint(1, 97, (1, 10), generator=generator(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **with_cache(cache))
    rows = cache.layers[0].values[0].transpose(0, 1)
    assert layer.table.shape == (97, layer.shape.kv_heads, layer.shape.head_dim)
    expected = layer.table[ids[0]]
    assert torch.allclose(expected[:1], rows[:1], atol=1e-4) and torch.allclose(expected, rows, atol=1e-4) == (family != "gpt2")
    assert layer.weight.shape == (layer.shape.widths()[2], 48)


def test_tries_are_what_the_value_is_a_fraction_of() -> None:
    tokens = text(80, 30)
    i, j = torch.triu_indices(80, 80, 1)
    equal = int((tokens[i] == tokens[j]).sum())
    attacks = audit_kv_shield(tiny("llama"), tokens)
    assert {attack.tries for attack in attacks if attack.name in ("equal_pairs", "snapshots")} == {equal}
