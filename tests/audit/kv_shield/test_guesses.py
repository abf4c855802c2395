from __future__ import annotations

import torch

from cloven.audit.kv_shield.guesses import THIEF, every_token, hits, in_every_mode, nearest
from cloven.audit.kv_shield.subject import MODES
from tests.audit.kv_shield.subjects import by_mode, generator, subject


def test_the_nearest_row() -> None:
    rows, table = (torch.randn(count, 5, generator=generator(count)) for count in (70, 9))
    expected = [int((table - row).abs().sum(1).argmin()) for row in rows]
    assert nearest(rows, table).tolist() == expected
    assert hits(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 0])) == 0.5


def test_every_mode_beside_the_one_without_protection() -> None:
    found = by_mode(in_every_mode("name", "metric", {"none": 0.9, "permute": 0.2, "session": 0.01, "sealed": 0.0}, 0.01, 400))
    assert [one.verdict for one in found.values()] == ["broken", "measured", "holds", "holds"]
    assert {(one.adversary, one.metric, one.chance, one.tries) for one in found.values()} == {(THIEF, "metric", 0.01, 400)}


def test_a_guess_that_is_always_right_and_one_that_is_the_commonest_token() -> None:
    tokens = subject().tokens
    assert [one.value for one in every_token(subject(), "oracle", lambda rows, table: tokens)] == [1.0] * len(MODES)
    commonest = every_token(subject(), "commonest", lambda rows, table: tokens.mode().values.expand(len(tokens)))
    assert {(one.value, one.chance, one.verdict) for one in commonest} == {
        (subject().chance, subject().chance, "measured")
    }  # no conclusion: not without a key either


def test_nothing_holds_where_the_attack_fails_without_the_protection() -> None:
    """Mode none is the control."""
    found = {one.scheme: one for one in in_every_mode("name", "metric", {"none": 0.12, "session": 0.06}, 0.06, 400)}
    assert found["kv-shield/session"].verdict == "measured" and found["kv-shield/session"].metric.endswith("no conclusion")
    assert found["kv-shield/none"].metric == "metric"
