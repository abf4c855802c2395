from __future__ import annotations

import torch

from cloven.audit.kv_shield.guesses import DEVICE, hits
from cloven.audit.kv_shield.weights import match_rows, weights
from tests.audit.kv_shield.subjects import HEADS, D, by_mode, generator, subject


def test_rows_of_weights_are_matched_within_their_head() -> None:
    public = torch.randn(HEADS * D, 30, generator=generator())
    order = torch.cat([torch.randperm(D, generator=generator(head)) + D * head for head in range(HEADS)])
    assert torch.equal(match_rows(public[order] + 1e-3, public, HEADS), order)
    assert hits(match_rows(torch.randn(HEADS * D, 30, generator=generator(4)), public, HEADS), order) < 0.6


def test_permutations_are_read_off_and_no_key_of_a_session_is_there() -> None:
    found = by_mode(weights(subject()), "weights")
    assert all(found[mode].value == 1 and found[mode].verdict == "broken" for mode in ("none", "permute"))
    assert "sealed" not in found  # it changes the cache alone
    assert found["session"].value == 0 and found["session"].verdict == "holds"
    assert all(one.adversary == DEVICE and one.chance == 1 / 16 and one.tries == 32 for one in found.values())
