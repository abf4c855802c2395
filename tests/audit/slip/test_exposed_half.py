from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cloven.audit.slip.exposed_half import exposed_half, knowledge, nothing, random_secret, verdict_beside, without_gifts
from cloven.zoo.text import perplexity
from tests.audit.slip.subjects import based_subject, demo_subject, named
from tests.split_models import demo_model


def test_what_is_left_of_the_demo_model() -> None:
    subject = demo_subject()
    found = named(exposed_half(replace(subject, relative=demo_model())))
    ends = ("", "_unscrambled", "_random_secret", "_relatives_secret")
    assert set(found) == {f"exposed_half{end}{gifts}" for end in ends for gifts in ("", "_without_gifts")}
    assert found["exposed_half"].value < 0.05 and found["exposed_half_unscrambled"].value < 0.2
    # the control: a relative that is the model itself gives the secret away
    assert found["exposed_half_relatives_secret"].value > 0.9
    relative = found["exposed_half_relatives_secret"]
    assert relative.chance > 0.9 and relative.verdict != "broken" and relative.adversary.endswith("who has a public relative")
    assert found["exposed_half_relatives_secret_without_gifts"].value > 0.5  # scales matter little, and the relative has the rest
    reached = found["exposed_half_unscrambled"].details
    assert reached["perplexity"] > 5 * reached["perplexity_of_the_model"]


def test_what_a_public_base_gives_anybody_is_no_break() -> None:
    """A fine-tune of a public model: the exposed half is worth what the base is."""
    subject = based_subject()
    beside = named(exposed_half(subject))
    assert beside["exposed_half_unscrambled"].value > 0.9 and beside["exposed_half_unscrambled"].verdict != "broken"
    assert beside["exposed_half_unscrambled"].chance > 0.9
    unknown = named(exposed_half(replace(subject, relative=None)))  # the audit says that nobody can tell: see test_audit
    assert unknown["exposed_half_unscrambled"].verdict == "broken"


@pytest.mark.parametrize(
    ("value", "chance", "verdict"),
    [
        (0.02, 0.0, "holds"),
        (0.1, 0.0, "measured"),
        (0.5, 0.0, "broken"),
        (0.951, 0.95, "holds"),
        (0.96, 0.95, "measured"),
        (0.9989, 0.9834, "broken"),
        (0.99, 0.95, "broken"),
        (1.0, 1.0, "holds"),
        (1.0, 0.9986, "holds"),  # the control, a relative that is the model itself, with one of many keys
        (1.0, 0.99, "broken"),
    ],
)
def test_verdicts_beside_what_anybody_has(value: float, chance: float, verdict: str) -> None:
    assert verdict_beside(value, chance) == verdict


def test_what_the_attacker_makes_up() -> None:
    subject = demo_subject()
    model = without_gifts(subject.with_matrices(lambda group, part: group.weight(part)), subject)
    own, made_up = dict(subject.plain.named_parameters()), dict(model.named_parameters())
    split = {f"{member.name}.weight" for group in subject.groups for member, _ in group.parts}
    assert set(own) == set(made_up)
    for name, parameter in made_up.items():
        assert torch.equal(parameter, own[name]) is (name in split), name
    table = made_up["model.embed_tokens.weight"]
    assert torch.allclose(table.std(), own["model.embed_tokens.weight"].std(), rtol=0.05)
    assert bool((made_up["model.norm.weight"] == 1).all())
    assert perplexity(model, subject.text) > 10 * perplexity(subject.plain, subject.text)
    with_relative = without_gifts(model, replace(subject, relative=demo_model()))
    assert all(torch.equal(p, own[name]) for name, p in with_relative.named_parameters() if name not in split)


def test_a_random_secret_is_as_large_and_elsewhere() -> None:
    exposed, coin = torch.zeros(9, 7), torch.Generator().manual_seed(0)
    b, a = torch.randn(9, 2, generator=coin), torch.randn(2, 7, generator=coin)
    made = random_secret(exposed, b, a, coin)
    assert torch.allclose(torch.linalg.svdvals(made)[:2], torch.linalg.svdvals(b @ a)[:2], atol=1e-5)
    assert float(torch.nn.functional.cosine_similarity(made.flatten(), (b @ a).flatten(), dim=0).abs()) < 0.5
    assert torch.equal(random_secret(exposed, b[:, :0], a[:0], coin), exposed)


def test_without_scramble_there_is_no_scrambled_half() -> None:
    assert "exposed_half" not in named(exposed_half(demo_subject(scramble="none")))


def test_with_the_secret_in_its_place_everything_is_known() -> None:
    subject = demo_subject()
    model = subject.with_matrices(lambda group, part: group.weight(part))
    assert knowledge(perplexity(model, subject.text), subject) == pytest.approx(1.0, abs=1e-3)


def test_nothing_is_the_entropy_of_the_tokens() -> None:
    assert nothing(torch.tensor([[0, 1, 2, 1, 2]])) == pytest.approx(math.log(2))
    assert nothing(torch.ones(2, 5, dtype=torch.int64)) == 0.0


def test_a_text_that_the_model_cannot_predict() -> None:
    subject = demo_subject()
    same = replace(subject, text=torch.full((1, 200), 7))
    assert knowledge(perplexity(subject.plain, same.text), same) == 0.0  # one token, over and over: its frequency says all


def test_without_a_scramble_nobody_is_given_its_keys() -> None:
    """Else its attacks would stand under the headline of somebody who was."""
    from cloven.audit.report import code_of
    from cloven.audit.slip.null_space import null_space

    subject = demo_subject(scramble="none")
    found = [*exposed_half(subject), *null_space(subject)]
    assert found and {code_of(attack) for attack in found} == {"A1"}
    assert {code_of(attack) for attack in exposed_half(demo_subject())} == {"A1", "A1 keys"}
