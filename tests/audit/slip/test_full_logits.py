from __future__ import annotations

from dataclasses import replace

import torch

from cloven.audit.slip.full_logits import full_logits, head_from_logits, least_rotation
from tests.audit.slip.subjects import demo_subject, named
from tests.split_models import demo_model


def test_full_logits_align_the_heads_rows() -> None:
    """A break that is stated: endpoints do not offer them. What holds is that it takes the logits."""
    found = full_logits(demo_subject())
    attack = named(found, "permutation")["full_logits"]
    assert attack.value > 0.9 and attack.weakened_value > 0.9 and attack.verdict == "broken"
    mixed = named(found, "mixing")
    assert mixed["full_logits"].value < 0.02 and mixed["full_logits"].weakened_value > 0.9 and mixed["full_logits"].verdict == "holds"
    span = mixed["full_logits_span"]
    assert span.value > 0.999 and span.chance == 0.25 and span.verdict == "broken"  # with any split


def test_the_least_rotation() -> None:
    a = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(least_rotation(a, a @ torch.randn(4, 4, dtype=torch.float64)), torch.eye(30, dtype=torch.float64), atol=1e-9)
    b = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = least_rotation(a, b)
    assert torch.allclose(rotation @ rotation.t(), torch.eye(30, dtype=torch.float64), atol=1e-9)
    q = torch.linalg.qr(b)[0]
    assert torch.allclose(q @ (q.t() @ rotation @ a), rotation @ a, atol=1e-9)


def test_without_logits_of_this_model_nothing_is_aligned() -> None:
    subject = demo_subject()
    torch.manual_seed(0)
    other = replace(subject, plain=type(demo_model())(demo_model().config).eval())
    found = full_logits(other)
    assert all(attack.value < 0.05 for attack in found if attack.name == "full_logits")
    assert named(found, "mixing")["full_logits_span"].value < 0.5


def test_logits_span_the_head() -> None:
    subject = demo_subject("int8x2")
    head = subject.groups[-1].weight(0).double()
    known = head_from_logits(subject, head.shape[1])
    solution = torch.linalg.lstsq(known, head).solution
    assert float((known @ solution - head).norm() / head.norm()) < 1e-3


def test_where_it_does_not_apply() -> None:
    assert {attack.name for attack in full_logits(demo_subject(scramble="none"))} == {"full_logits_span"}  # there is no scramble
    assert full_logits(replace(demo_subject(), groups=demo_subject().groups[:2])) == []
