from __future__ import annotations

from dataclasses import replace

import pytest

from cloven.audit.attack import Attack
from cloven.audit.slip import audit as module
from cloven.audit.slip.audit import NOT_TESTED, audit_slip
from cloven.audit.slip.subject import Subject
from cloven.audit.slip.training import Budget
from cloven.errors import WorkerTimeout
from tests.audit.slip.subjects import based_subject, tiny_subject
from tests.split_models import tiny_bundle


def test_a_tiny_bundle_from_end_to_end() -> None:
    stages: list[str] = []
    subject = tiny_subject()
    findings = audit_slip(
        tiny_bundle("llama").path, subject.text, seed=4, budget=Budget(0), progress=lambda stage, done, total: stages.append(stage)
    )
    names = [attack.name for attack in findings.attacks]
    assert (
        findings.scheme == "slip"
        and len({(attack.name, attack.scheme) for attack in findings.attacks}) == len(names)
        and len(set(names)) >= 12
    )
    assert {"liar", "full_logits", "transcript_uniform", "plaintext_adjacency", "exposed_half"} <= set(names)
    assert findings.parameters["seed"] == 4 and findings.parameters["bundle"] == tiny_bundle("llama").id
    assert (
        "Recovery by training: it was switched off, by a budget of 0." in findings.not_tested
        and findings.not_tested[-len(NOT_TESTED) :] == NOT_TESTED
    )
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
    monkeypatch.setattr(module, "_beside_the_base", lambda subject, attack: attack)
    monkeypatch.setattr(module, "training_text", lambda subject, budget: subject.text)
    monkeypatch.setattr(module, "recovery", lambda subject, data, budget, progress: ([budget.seconds], []))
    monkeypatch.setattr(module, "learned_scramble", lambda subject, data, budget, progress: [budget.seconds])
    findings = audit_slip(tiny_bundle("llama").path, tiny_subject().text, seed=0, budget=Budget(120))
    first, second = (float(seconds) for seconds in findings.attacks)  # type: ignore[arg-type]
    assert (
        first == pytest.approx(90, abs=1) and second == pytest.approx(30, abs=1) and findings.not_tested[-len(NOT_TESTED) :] == NOT_TESTED
    )


def test_an_attack_that_fails_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def transcripts(subject: Subject) -> list[Attack]:
        raise WorkerTimeout("no answer came")

    monkeypatch.setattr(module, "ATTACKS", (transcripts, module.liars))
    findings = audit_slip(tiny_bundle("llama").path, tiny_subject().text, seed=0, budget=Budget(0))
    assert [attack.name for attack in findings.attacks] == ["liar"]
    assert "Transcripts: it failed: no answer came" in findings.not_tested
    assert [str(error) for error in findings.failed] == ["Transcripts: no answer came"]


def test_why_an_attack_was_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(subject: Subject) -> list[Attack]:
        return []

    bundle = based_subject().bundle.path
    chosen = (module.unscrambling, module.weight_directions, module.null_space)
    monkeypatch.setattr(module, "ATTACKS", chosen)
    for attack in chosen:
        monkeypatch.setattr(module, attack.__name__, attack)
    said = audit_slip(bundle, based_subject().text, seed=0, budget=Budget(1e-9)).not_tested
    assert "Unscrambling: the bundle has no scramble." in said
    assert "Weight directions: no public relative was named (--relative MODEL)." in said
    assert "Null space: the public base was not named (--relative MODEL)." in said
    assert any(line.startswith("Recovery by training, and learned scramble: ") and "raise --budget-minutes" in line for line in said)
    monkeypatch.setattr(module, "ATTACKS", (nothing,))
    assert "Nothing: its matrices are too large, or too few." in audit_slip(bundle, None, seed=0, budget=Budget(0)).not_tested


def test_beside_a_base_that_nobody_named() -> None:
    known, text = based_subject(), "broken"
    found = {attack.name: attack for attack in module.exposed_half(replace(known, relative=None))}["exposed_half_unscrambled"]
    shown = module._beside_the_base(replace(known, relative=None), found)
    assert found.verdict == text and shown.verdict == "measured" and "name it with --relative" in shown.metric
    assert module._beside_the_base(known, found) is found and module._beside_the_base(tiny_subject(), found) is found
