from __future__ import annotations

import torch

from cloven.audit.kv_shield.equal_pairs import column_spaces, equal_pairs, pairs_found
from tests.audit.kv_shield.subjects import D, by_mode, generator, mixed, subject, table, text


def test_equal_pairs_show_through_every_key() -> None:
    tokens = text(64, 12)
    rows = table()[tokens]
    assert pairs_found(column_spaces(rows), tokens) == 1
    assert pairs_found(column_spaces(mixed(rows, 0)), tokens) == 1  # without noise
    assert pairs_found(column_spaces(torch.randn(rows.shape, generator=generator(8))), tokens) < 0.3


def test_no_equal_pairs_no_score() -> None:
    tokens = torch.arange(20)
    assert pairs_found(column_spaces(table()[tokens]), tokens) == 0


def test_column_spaces_do_not_depend_on_the_key() -> None:
    rows = table()[text()]
    for a, b in zip(column_spaces(rows), column_spaces(mixed(rows, 0)), strict=True):
        assert torch.allclose(a @ a.t(), b @ b.t(), atol=1e-4)
        assert torch.allclose(a.t() @ a, torch.eye(D, dtype=torch.float64), atol=1e-9)


def test_a_session_shows_equal_tokens_and_a_sealed_cache_does_not() -> None:
    found = by_mode(equal_pairs(subject()), "equal_pairs")
    assert all(found[mode].value == 1 and found[mode].verdict == "broken" for mode in ("none", "permute"))
    assert 0.4 < found["session"].value < 1 and found["sealed"].value < 0.15


def test_tries_are_what_the_value_is_a_fraction_of() -> None:
    tokens = subject().tokens
    i, j = torch.triu_indices(len(tokens), len(tokens), 1)
    assert {attack.tries for attack in equal_pairs(subject())} == {int((tokens[i] == tokens[j]).sum())}
