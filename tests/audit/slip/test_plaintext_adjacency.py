"""On the demo model; the attack's own properties are in tests/attacks/test_plaintext_adjacency.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cloven.audit.slip import plaintext_adjacency as module
from cloven.audit.slip.plaintext_adjacency import plaintext_adjacency, recovered_share, solve
from tests.audit.slip.subjects import demo_subject, named


def test_leaked_pairs_give_the_secret_and_masked_ones_nothing() -> None:
    attack = named(plaintext_adjacency(demo_subject()))["plaintext_adjacency"]
    assert attack.value < 0.05 and attack.weakened_value > 0.99 and attack.verdict == "holds"


def test_what_a_worker_recorded_in_the_clear_gives_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weakened system: rows without masks, of a layer whose output is the next one's input."""
    subject = demo_subject()
    pair = module.pair_of(subject)
    assert pair is not None and pair[0].parts[0][0].secret_a.shape[0] == max(g.parts[0][0].secret_a.shape[0] for g in subject.groups[:-1])
    monkeypatch.setattr(module, "recorded", lambda subject, group, _second: module._rows_into(subject, group))
    attack = named(plaintext_adjacency(subject))["plaintext_adjacency"]
    assert attack.value > 0.95 and attack.verdict == "broken"


def test_nothing_to_solve_for() -> None:
    assert plaintext_adjacency(replace(demo_subject(), groups=())) == []


def test_shares() -> None:
    secret = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    assert recovered_share(3 * secret, secret) > 1 - 1e-12
    assert recovered_share(torch.zeros(5, 4).double(), secret) == 0.0
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    assert torch.allclose(solve(x, x @ secret.t()), secret)
