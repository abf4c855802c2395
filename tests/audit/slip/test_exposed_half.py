from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cloven.audit.slip.exposed_half import exposed_half, knowledge, nothing
from tests.audit.slip.subjects import demo_subject, named
from tests.split_models import demo_model


def test_what_is_left_of_the_demo_model() -> None:
    subject = demo_subject()
    found = named(exposed_half(replace(subject, relative=demo_model())))
    assert set(found) == {f"exposed_half{end}" for end in ("", "_unscrambled", "_random_secret", "_relatives_secret")}
    assert found["exposed_half"].value < 0.05 and found["exposed_half_unscrambled"].value < 0.2
    # the control: a relative that is the model itself gives the secret away
    assert found["exposed_half_relatives_secret"].value > 0.9


def test_without_scramble_there_is_no_scrambled_half() -> None:
    assert "exposed_half" not in named(exposed_half(demo_subject(scramble=False)))


def test_with_the_secret_in_its_place_everything_is_known() -> None:
    subject = demo_subject()
    model = subject.with_matrices(lambda group, part: group.weight(part))
    assert knowledge(model, subject) == pytest.approx(1.0, abs=1e-3)


def test_nothing_is_the_entropy_of_the_tokens() -> None:
    assert nothing(torch.tensor([[0, 1, 2, 1, 2]])) == pytest.approx(math.log(2))
    assert nothing(torch.ones(2, 5, dtype=torch.int64)) == 0.0


def test_a_text_that_the_model_cannot_predict() -> None:
    subject = demo_subject()
    same = replace(subject, text=torch.full((1, 200), 7))
    assert knowledge(subject.plain, same) == 0.0  # one token, over and over: its frequency says all
