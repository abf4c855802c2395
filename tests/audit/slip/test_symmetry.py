from __future__ import annotations

from dataclasses import replace

import torch

from cloven.audit.slip import symmetry as module
from cloven.audit.slip.symmetry import mixing_symmetry, moment, share_of_symmetry
from tests.audit.slip.subjects import demo_subject, tiny_subject


def test_the_bundle_shows_no_symmetry() -> None:
    subject = demo_subject()
    (attack,) = mixing_symmetry(replace(subject, groups=subject.groups[-1:]))  # lm_head: the longest
    assert attack.verdict != "broken" and attack.value < 0.06 and attack.details["highest_symmetry"] < 0.18
    assert attack.weakened_value > 0.95 and attack.tries == 256 and 0 < attack.chance < 0.06


def test_one_that_is_found_is_broken_whatever_its_share() -> None:
    """The finder knows that it is right."""
    subject = demo_subject()
    found = module.symmetry
    try:
        module.symmetry = lambda vectors, random, tries: (torch.eye(len(vectors)).roll(1, 0), 0.3)
        (attack,) = mixing_symmetry(replace(subject, groups=subject.groups[-1:]))
    finally:
        module.symmetry = found
    assert attack.verdict == "broken" and attack.details["highest_symmetry"] == 0.3


def test_where_it_does_not_apply() -> None:
    assert mixing_symmetry(demo_subject(scramble="permutation")) == [] == mixing_symmetry(demo_subject(scramble="none"))
    assert mixing_symmetry(tiny_subject()) == []


def test_a_share_is_one_for_the_mixings_own_symmetries_alone() -> None:
    labels = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    place = labels.argsort()
    own = torch.zeros(512, 512)
    own[torch.arange(512), place[labels ^ 37]] = -1.0
    assert share_of_symmetry(own, labels) == 1.0
    assert share_of_symmetry(own, labels.roll(1)) < 0.05
    assert share_of_symmetry(torch.eye(512), labels) == 1.0  # a fixed point is the difference 0: `symmetry` finds none


def test_the_moment_has_no_diagonal() -> None:
    m = moment(torch.randn(8, 40, generator=torch.Generator().manual_seed(0)))
    assert m.shape == (8, 8) and not m.diag().any() and abs(float(m.std()) - 1) < 1e-9
