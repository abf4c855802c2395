from __future__ import annotations

import torch

from cloven.audit.kv_shield.guesses import hits
from cloven.audit.kv_shield.known_plaintext import by_known_plaintext, known_plaintext
from tests.audit.kv_shield.subjects import NOISE, TOKENS, D, by_mode, generator, mixed, rotated, subject, table


def test_known_plaintext_needs_as_many_tokens_as_the_rows_are_wide() -> None:
    tokens = torch.randperm(TOKENS, generator=generator(3))
    rows = mixed(table()[tokens])
    full = D + NOISE
    assert hits(by_known_plaintext(rows, table(), tokens, full + 2), tokens[full + 2 :]) >= 0.95
    assert hits(by_known_plaintext(rows, table(), tokens, 3), tokens[3:]) < 0.3


def test_known_plaintext_of_an_orthogonal_key_needs_d_only() -> None:
    tokens = torch.randperm(TOKENS, generator=generator(3))
    assert hits(by_known_plaintext(rotated(table()[tokens]), table(), tokens, D + 1), tokens[D + 1 :]) >= 0.95


def test_what_a_beginning_gives_away() -> None:
    attacks = known_plaintext(subject())
    few, half, enough = (by_mode(attacks, f"known_plaintext{suffix}") for suffix in ("_quarter", "_half", ""))
    assert len(attacks) == 12
    assert all(enough[mode].value >= 0.95 and enough[mode].verdict == "broken" for mode in ("none", "permute", "session"))
    assert few["session"].value < 0.4 and few["session"].value < half["session"].value <= enough["session"].value
    assert all(found["sealed"].value < 0.15 for found in (few, half, enough))
    assert [found["none"].tries for found in (few, half, enough)] == [160 - 6, 160 - 12, 160 - 32]
    assert "once 32 are known (d + ρ = 24)" in enough["none"].metric
