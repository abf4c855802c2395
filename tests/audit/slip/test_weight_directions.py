from __future__ import annotations

from dataclasses import replace

import torch

from cloven.audit.slip.exposed_half import relatives_secret
from cloven.audit.slip.weight_directions import aligned_matrix, guesses, weight_directions
from tests.audit.slip.subjects import demo_subject, named
from tests.split_models import demo_model


def test_a_relative_breaks_the_scramble() -> None:
    """The control on the whole attack: the model itself for a relative, and then one that differs by 10 %."""
    permuted = demo_subject(scramble="permutation")
    few = replace(permuted, groups=permuted.groups[:4])
    for noise in (0.0, 0.1):
        relative, random = type(demo_model())(demo_model().config), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for ours, true in zip(relative.parameters(), demo_model().parameters(), strict=True):
                ours.copy_(true + noise * true.std() * torch.randn(true.shape, generator=random) if true.dim() > 1 else true)
        subject = replace(few, relative=relative)
        found = named(weight_directions(subject))
        for side in ("rows", "columns"):
            attack = found[f"unscramble_{side}_by_relative"]
            assert attack.value > 0.9 and attack.weakened_value > 0.95 and attack.verdict == "broken"
        for group in subject.groups[:2]:
            ours, true = aligned_matrix(subject, group, 0), group.exposed[group.parts[0][1]]
            member = group.parts[0][0]
            given = relatives_secret(true, member.secret_a.shape[0], subject.relative_weight(member))  # what is the relative's own
            assert float((ours - given).norm() / given.norm()) < 0.05
        model = found["unscrambled_model"]
        assert model.value > 0.9 and model.verdict == ("broken" if noise else "holds")  # holds: the relative has it by itself


def test_what_a_relative_gets_of_a_mixing() -> None:
    """Not even the model itself tells singular vectors apart; of permutations it finds everything."""
    subject = replace(demo_subject(), relative=demo_model(), groups=demo_subject().groups[:2])
    found = weight_directions(subject)
    mixed, permuted = named(found, "mixing"), named(found, "permutation")
    for side in ("rows", "columns"):
        attack = mixed[f"unscramble_{side}_by_relative"]
        assert attack.value < 0.1 and attack.weakened_value > 0.93
        assert permuted[f"unscramble_{side}_by_relative"].value > 0.9
    ours, true = aligned_matrix(subject, subject.groups[1], 0), subject.groups[1].exposed
    assert ours.shape == true.shape and torch.allclose(ours.norm(), true.norm(), rtol=0.3)


def test_a_relative_that_is_none() -> None:
    subject = replace(demo_subject(), relative=type(demo_model())(demo_model().config), groups=demo_subject().groups[:2])
    for attack in weight_directions(subject):
        if attack.name != "unscrambled_model":
            assert attack.value < 0.05, attack


def test_without_a_relative_there_is_no_guess() -> None:
    subject = demo_subject()
    assert guesses(subject) == (None,) * len(subject.groups) and weight_directions(subject) == []
    lying = aligned_matrix(subject, subject.groups[1], 0)
    assert torch.allclose(lying.norm(), subject.groups[1].exposed.norm(), rtol=0.3)


def test_without_a_scramble_there_is_nothing_to_match() -> None:
    assert weight_directions(demo_subject(scramble="none")) == []
