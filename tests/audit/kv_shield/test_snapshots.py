from __future__ import annotations

from dataclasses import replace

import torch

from cloven.audit.kv_shield.equal_pairs import column_spaces
from cloven.audit.kv_shield.snapshots import shared_spaces, snapshots
from tests.audit.kv_shield.subjects import D, by_mode, generator, mixed, subject, table, text


def test_two_snapshots_share_what_is_no_noise() -> None:
    rows = table()[text()]
    shared = shared_spaces(column_spaces(mixed(rows, seed=5)), column_spaces(mixed(rows, seed=7)), D)
    for found, true in zip(shared, column_spaces(rows), strict=True):
        assert torch.allclose(found @ found.t(), true @ true.t(), atol=1e-4)


def test_a_second_session_takes_the_noise_away() -> None:
    found = by_mode(snapshots(subject()), "snapshots")
    assert all(found[mode].value >= 0.95 and found[mode].verdict == "broken" for mode in ("none", "permute", "session"))
    assert found["sealed"].value < 0.15


def test_a_session_with_another_text_does_not() -> None:
    other = replace(subject(), second=torch.randn(subject().second.shape, generator=generator(4)))
    assert by_mode(snapshots(other))["session"].value < 0.9


def test_tries_are_what_the_value_is_a_fraction_of() -> None:
    tokens = subject().tokens
    i, j = torch.triu_indices(len(tokens), len(tokens), 1)
    assert {attack.tries for attack in snapshots(subject())} == {int((tokens[i] == tokens[j]).sum())}
