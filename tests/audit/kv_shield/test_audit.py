"""The whole audit; the figures themselves are in tests/attacks/test_cache_thief.py, on the demo model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.kv_shield import audit as module
from cloven.audit.kv_shield.audit import NOT_TESTED, TEXT_TOKENS, attack_cache, audit_kv_shield
from cloven.audit.kv_shield.subject import MODES, Subject
from cloven.errors import BadInput
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.manifest import TRUSTED, KvManifest
from tests.audit.kv_shield.subjects import by_mode, generator
from tests.kv_bundles import kv_bundle
from tests.split_models import tiny

NEEDED = 2 * (12 + 16) + 16  # of the tiny models, at ρ = 16
NAMES = (
    "table",
    "sorting",
    "norms",
    "gram",
    "known_plaintext_quarter",
    "known_plaintext_half",
    "known_plaintext",
    "equal_pairs",
    "snapshots",
    "weights",
)


def tokens(count: int) -> Tensor:
    """A text with repetitions, int64 [T]."""
    return torch.randint(1, 40, (count,), generator=generator())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Subject]:
    """What is attacked, instead of the attacks."""
    subjects: list[Subject] = []

    def record(subject: Subject) -> list[Attack]:
        subjects.append(subject)
        return []

    monkeypatch.setattr(module, "ATTACKS", (record,))
    return subjects


def test_every_attack_in_every_mode() -> None:
    attacks = attack_cache(tiny("llama"), tokens(80))
    assert (
        tuple(dict.fromkeys(attack.name for attack in attacks)) == NAMES and len(attacks) == len(NAMES) * len(MODES) - 1
    )  # sealing changes no weights
    for name in NAMES:
        by_mode(attacks, name)


@pytest.mark.parametrize("mode", ["permute", "session"])
def test_what_makes_it_reproducible_and_what_was_not_tested(mode: str) -> None:
    out = kv_bundle("llama", mode)
    findings = audit_kv_shield(out, tokens(NEEDED))
    assert findings.scheme == "kv-shield" and findings.figures == [] and findings.not_tested == NOT_TESTED
    parameters = findings.parameters
    assert parameters["bundle"] == KvManifest.read(out / "trusted", TRUSTED).bundle
    assert (parameters["mode"], parameters["noise_dims"], parameters["head_dim"]) == (mode, 16, 12)
    assert (parameters["text_tokens"], parameters["text"]) == (NEEDED, "given")


def test_a_text_is_sampled_where_none_is_given(seen: list[Subject]) -> None:
    first, second = (audit_kv_shield(kv_bundle("llama", "session")) for _ in range(2))
    assert first.attacks == [] and first.to_dict() == second.to_dict()
    assert first.parameters["text"] == "sampled from the model, seed 3"
    assert seen[0].tokens.shape == (TEXT_TOKENS,) and torch.equal(seen[0].tokens, seen[1].tokens)


def test_the_noise_is_the_bundles(seen: list[Subject]) -> None:
    audit_kv_shield(kv_bundle("llama", "session"), tokens(NEEDED))
    attack_cache(tiny("llama"), tokens(NEEDED), KvShieldConfig("session", 4))
    assert [subject.noise for subject in seen] == [16, 4]
    assert [subject.caches["session"].shape[2] for subject in seen] == [12 + 16, 12 + 4]


def test_a_text_must_be_long_enough() -> None:
    with pytest.raises(BadInput, match=f"the text has {NEEDED - 1} tokens: give at least {NEEDED}"):
        audit_kv_shield(kv_bundle("llama", "session"), tokens(NEEDED - 1))
