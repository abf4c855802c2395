from __future__ import annotations

import pytest

from cloven.audit.slip import audit as module
from cloven.audit.slip.audit import NOT_TESTED, audit_slip
from tests.audit.slip.subjects import tiny_subject
from tests.split_models import tiny_bundle


def test_a_tiny_bundle_from_end_to_end() -> None:
    stages: list[str] = []
    subject = tiny_subject()
    findings = audit_slip(
        tiny_bundle("llama").path, subject.text, seed=4, minutes=0, progress=lambda stage, done, total: stages.append(stage)
    )
    names = [attack.name for attack in findings.attacks]
    assert (
        findings.scheme == "slip"
        and len({(attack.name, attack.scheme) for attack in findings.attacks}) == len(names)
        and len(set(names)) >= 12
    )
    assert {"liar", "full_logits", "transcript_uniform", "plaintext_adjacency", "exposed_half"} <= set(names)
    assert findings.parameters["seed"] == 4 and findings.parameters["bundle"] == tiny_bundle("llama").id
    assert "Recovery by training: --budget-minutes 0." in findings.not_tested and findings.not_tested[-len(NOT_TESTED) :] == NOT_TESTED
    # the tiny model is random and the text too: what is known of it says nothing, and nothing is claimed
    assert any(line.startswith("What the exposed half knows of the text") for line in findings.not_tested)
    knowing = next(attack for attack in findings.attacks if attack.name == "exposed_half")
    assert knowing.weakened_value == 0.0 and knowing.verdict == "measured" and knowing.metric.endswith("no conclusion")
    assert {"loading", "attacks", "curves"} <= set(stages)
    record = findings.to_dict()
    assert set(record) == {"version", "scheme", "attacks", "figures", "parameters", "not_tested"}
    keys = {"name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict", "interval", "details"}
    assert all(set(attack) == keys for attack in record["attacks"])


def test_training_is_part_of_it_when_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTACKS", ())
    monkeypatch.setattr(module, "controlled", lambda attack: attack)
    monkeypatch.setattr(module, "training_text", lambda subject: subject.text)
    monkeypatch.setattr(module, "recovery", lambda subject, data, seconds, progress: ([seconds], []))
    monkeypatch.setattr(module, "learned_scramble", lambda subject, data, seconds, progress: [seconds])
    findings = audit_slip(tiny_bundle("llama").path, tiny_subject().text, seed=0, minutes=2)
    first, second = (float(seconds) for seconds in findings.attacks)  # type: ignore[arg-type]
    assert (
        first == pytest.approx(90, abs=1) and second == pytest.approx(30, abs=1) and findings.not_tested[-len(NOT_TESTED) :] == NOT_TESTED
    )
