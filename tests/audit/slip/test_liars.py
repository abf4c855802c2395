from __future__ import annotations

import pytest
import torch

from cloven.audit.slip import liars as module
from cloven.audit.slip.liars import LIES, liars, lies_about, verdict_of_lies
from cloven.field.freivalds import Freivalds
from cloven.field.selection import select_backend
from tests.audit.slip.subjects import demo_subject, named
from tests.helpers import python_product, random_codes


def test_every_lie_is_caught() -> None:
    attack = named(liars(demo_subject()))["liar"]
    assert (attack.value, attack.weakened_value, attack.verdict) == (0.0, 1.0, "holds") and attack.tries > 100


def test_without_the_check_they_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Freivalds, "check", lambda *_: None)
    attack = named(module.liars(demo_subject()))["liar"]
    assert attack.value == 1.0 and attack.verdict == "broken"


def test_lies_are_lies() -> None:
    codes, other = random_codes(9, 12), random_codes(9, 12, seed=1)
    told = list(lies_about(codes, other, select_backend()))
    assert len(told) == len(LIES) + 2
    for c, right, lie in told:
        assert torch.equal(right, python_product(c, codes))
        assert lie.shape == right.shape and lie.dtype == torch.int32 and not torch.equal(lie, right)


def test_an_answer_that_is_right_is_no_lie() -> None:
    told = list(lies_about(torch.zeros(4, 6, dtype=torch.int8), None, select_backend()))
    assert 0 < len(told) < len(LIES)  # zeros, say, are the right answer


def test_a_single_lie_that_is_believed_breaks_it() -> None:
    assert verdict_of_lies(0) == "holds" and verdict_of_lies(1) == "broken"
