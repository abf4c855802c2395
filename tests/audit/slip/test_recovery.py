from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cloven.audit.attack import Attack
from cloven.audit.figure import Figure
from cloven.audit.slip import recovery as module
from cloven.audit.slip import training
from cloven.audit.slip.recovery import attacks_of, recovery
from cloven.audit.slip.subject import Subject
from cloven.audit.slip.training import BATCH, WINDOW, Budget
from cloven.zoo.text import sample_text
from tests.audit.slip.subjects import demo_subject, named, tiny_subject
from tests.split_models import demo_model

STEPS = 1
ATTACKS = {"recovery_full", "recovery_distilled", "recovery_low_rank", "recovery_guessed_subspace"}
SCRAMBLED = {"recovery_scrambled", "recovery_scrambled_distilled", "recovery_aligned"}


@functools.cache
def data() -> Tensor:
    return sample_text(demo_model(), 8, 32, seed=9)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step at a rate that needs no trial, for as long as a measurement would say: test_training has those."""
    monkeypatch.setattr(module, "steps_of", lambda *_: STEPS)
    monkeypatch.setattr(training, "_best_rate", lambda *_: 1e-3)


def recovered(subject: Subject, text: Tensor | None = None) -> tuple[list[Attack], list[Figure]]:
    return recovery(subject, data() if text is None else text, Budget(0.0))


def test_what_is_trained_and_reported() -> None:
    attacks, (figure,) = recovered(replace(demo_subject(), relative=demo_model()))
    found = named(attacks)
    assert set(found) == ATTACKS | SCRAMBLED
    assert set(attacks_of(demo_subject())) == ATTACKS | SCRAMBLED - {"recovery_aligned"}  # nothing to align by
    baselines = {f"baseline: {start}{how}" for start in ("random matrices", "public relative") for how in ("", ", distilled")}
    lines = {name.removeprefix("recovery_") for name in found}
    assert set(figure.series) == {*baselines, *lines, "control: nothing secret", "control: guessed subspace, no decoy"}
    for name, attack in found.items():
        assert attack.tries == STEPS * BATCH * WINDOW and 0 <= attack.value <= 1
        assert attack.weakened_value > 0.95 or name == "recovery_guessed_subspace"  # nothing secret
        assert attack.chance > 0.99 and attack.verdict == "measured"  # the relative that is the model itself is the best baseline
        assert attack.details["perplexity_minus_the_best_baseline"] == pytest.approx(
            attack.details["perplexity"] - attack.details["perplexity_of_the_best_baseline"]
        )
    points = figure.series["full"]
    assert points[-1][0] == STEPS * BATCH * WINDOW and all(y > 1 for _, y in points)


def only(monkeypatch: pytest.MonkeyPatch, name: str, wanted: set[str]) -> None:
    """Trains no others of these starts: each takes seconds."""
    given = getattr(module, name)
    monkeypatch.setattr(module, name, lambda subject: {one: start for one, start in given(subject).items() if one in wanted})


@pytest.mark.long
def test_the_exposed_half_is_a_better_start_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the scramble undone, training gets further than from random matrices; and inside the secret's rows
    further than elsewhere."""
    monkeypatch.setattr(module, "steps_of", lambda *_: 20)
    for name, wanted in (
        ("baselines", {"random matrices"}),
        ("attacks_of", {"recovery_full", "recovery_guessed_subspace", "recovery_scrambled"}),
    ):
        only(monkeypatch, name, wanted)
    attacks, (figure,) = recovered(demo_subject())
    left = {name: min(y for _, y in points) for name, points in figure.series.items()}  # perplexities
    assert left["control: nothing secret"] < left["full"] < left["baseline: random matrices"]
    assert left["full"] < left["scrambled"]
    assert left["control: guessed subspace, no decoy"] < left["guessed_subspace"]
    assert named(attacks)["recovery_scrambled"].verdict == "holds"


def test_without_a_scramble_there_are_two_attacks_less() -> None:
    assert set(attacks_of(demo_subject(scramble="none"))) == ATTACKS


def test_training_changes_copies_only_and_the_same_seed_gives_the_same_numbers() -> None:
    subject, text = tiny_subject(), torch.randint(1, 97, (8, 32), generator=torch.Generator().manual_seed(1))
    before = [parameter.clone() for parameter in subject.plain.parameters()]
    exposed = [group.exposed.clone() for group in subject.groups]
    (first, curves), (second, again) = recovered(subject, text), recovered(subject, text)
    assert first == second and curves == again
    assert all(torch.equal(a, b) for a, b in zip(before, subject.plain.parameters(), strict=True))
    assert all(torch.equal(a, group.exposed) for a, group in zip(exposed, subject.groups, strict=True))
