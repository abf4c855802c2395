from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cloven.audit.slip import recovery as module
from cloven.audit.slip.recovery import LEAST_STEPS, recovery, steps_that_fit, train
from tests.audit.slip.subjects import demo_subject, named
from tests.split_models import demo_model


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SEQUENCES", 8)
    monkeypatch.setattr(module, "WINDOW", 32)


def test_what_is_trained_and_reported() -> None:
    subject = demo_subject()
    attacks, (figure,) = recovery(replace(subject, seconds=0.0, relative=demo_model()))
    found = named(attacks)
    assert set(found) == {"recovery_full", "recovery_low_rank", "recovery_scrambled"}
    assert set(figure.series) == {"random matrices", "public relative", *found, "nothing secret"}
    for attack in attacks:
        assert attack.tries == LEAST_STEPS * module.BATCH * module.WINDOW and 0 <= attack.value <= 1
        assert attack.weakened_value > 0.8  # nothing secret
        assert attack.chance > 0.8 and attack.verdict == "holds"  # the relative that is the model itself is the best baseline
    points = figure.series["recovery_full"]
    assert points[-1][0] == LEAST_STEPS * module.BATCH * module.WINDOW and all(y > 1 for _, y in points)


def test_the_exposed_half_is_a_better_start_than_nothing() -> None:
    """The control: with the scramble undone, training gets further than from random matrices."""
    subject = replace(demo_subject(), seconds=0.0)
    module.LEAST_STEPS, before = 25, module.LEAST_STEPS
    try:
        (figure,) = recovery(subject)[1]
    finally:
        module.LEAST_STEPS = before
    left = {name: points[-1][1] for name, points in figure.series.items()}  # perplexities
    assert left["nothing secret"] < left["recovery_full"] < left["random matrices"]
    assert left["recovery_full"] < left["recovery_scrambled"]


def test_without_a_scramble_there_is_one_attack_less() -> None:
    attacks, _ = recovery(replace(demo_subject(scramble=False), seconds=0.0))
    assert set(named(attacks)) == {"recovery_full", "recovery_low_rank"}


def test_training_changes_copies_only() -> None:
    subject = demo_subject()
    before = [parameter.clone() for parameter in subject.plain.parameters()]
    exposed = [group.exposed.clone() for group in subject.groups]
    recovery(replace(subject, seconds=0.0))
    assert all(torch.equal(a, b) for a, b in zip(before, subject.plain.parameters(), strict=True))
    assert all(torch.equal(a, group.exposed) for a, group in zip(exposed, subject.groups, strict=True))


def test_the_same_seed_gives_the_same_numbers() -> None:
    subject = replace(demo_subject(), seconds=0.0)
    (first, curves), (second, again) = recovery(subject), recovery(subject)
    assert first == second and curves == again


def test_steps_follow_the_time() -> None:
    subject = demo_subject()
    start = lambda: module._trainable(subject, lambda group, part: group.weight(part))  # noqa: E731
    data = subject.text[:, :32]
    with torch.enable_grad():
        assert steps_that_fit(replace(subject, seconds=0.0), [start], data) == LEAST_STEPS
        assert steps_that_fit(replace(subject, seconds=60.0), [start], data) > LEAST_STEPS
        assert [tokens for tokens, _ in train(subject, start, data, 4).curve] == [done * module.BATCH * 32 for done in (1, 3, 4)]
