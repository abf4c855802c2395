from __future__ import annotations

from dataclasses import replace

import torch

from cloven.audit.slip.full_logits import full_logits, head_from_logits
from tests.audit.slip.subjects import demo_subject, named
from tests.split_models import demo_model


def test_full_logits_align_the_heads_rows() -> None:
    """A break that is stated: endpoints do not offer them. What holds is that it takes the logits."""
    found = full_logits(demo_subject())
    attack = named(found, "permutation")["full_logits"]
    assert attack.value > 0.9 and attack.weakened_value > 0.9 and attack.verdict == "broken"
    assert named(found, "mixing") == {}  # its rows are of no one token


def test_without_logits_of_this_model_nothing_is_aligned() -> None:
    subject = demo_subject()
    torch.manual_seed(0)
    other = replace(subject, plain=type(demo_model())(demo_model().config).eval())
    assert all(attack.value < 0.05 for attack in full_logits(other))


def test_logits_span_the_head() -> None:
    subject = demo_subject("int8x2")
    head = subject.groups[-1].weight(0).double()
    known = head_from_logits(subject, head.shape[1])
    solution = torch.linalg.lstsq(known, head).solution
    assert float((known @ solution - head).norm() / head.norm()) < 1e-3


def test_where_it_does_not_apply() -> None:
    assert full_logits(demo_subject(scramble="none")) == []
    assert full_logits(replace(demo_subject(), groups=demo_subject().groups[:2])) == []
