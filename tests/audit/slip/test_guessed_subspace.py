from __future__ import annotations

import torch

from cloven.audit.slip.guessed_subspace import _Inside, guessed, inside_a_guess, inside_a_hole
from tests.audit.slip.subjects import demo_subject


def test_the_guess_is_the_bottom_of_the_spectrum() -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrix)
    matrix = matrix - s[0] * u[:, :1] @ vt[:1]  # a hole where the top was
    assert abs(float(guessed(matrix, 1)[0] @ vt[0])) > 0.999
    rows = guessed(matrix, 3)
    assert torch.allclose(rows @ rows.t(), torch.eye(3), atol=1e-5)
    for wide in (False, True):
        inside = _Inside(matrix.t().contiguous() if wide else matrix, 1)
        with torch.no_grad():
            inside.learnt.fill_(1.0)
            added = inside(torch.zeros(matrix.t().shape if wide else matrix.shape))
        assert abs(float((added if wide else added.t()).flatten(1)[:, 0] @ vt[0])) / float(added.norm()) > 0.25  # along the hole


def test_only_b_is_learnt_and_nothing_changes_before_it_is() -> None:
    subject = demo_subject()
    for start, same in ((inside_a_guess(subject), True), (inside_a_hole(subject), False)):
        model = start.model()
        learnt = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ranks = {member.name: member.secret_a.shape[0] for group in subject.groups for member, _ in group.parts}
        assert len(learnt) == sum(rank > 0 for rank in ranks.values()) and all(name.endswith(".learnt") for name in learnt)
        for group in subject.groups:
            for member, rows in group.parts:
                weight = model.get_submodule(member.name).weight.detach()
                assert torch.equal(weight, group.exposed[rows]) is same or not ranks[member.name]


def test_a_hole_shows_the_secrets_rows() -> None:
    subject, model = demo_subject(), inside_a_hole(demo_subject()).model()
    group = max(subject.groups, key=lambda one: one.parts[0][0].secret_a.shape[0])
    member = group.parts[0][0]
    assert member.out_features > member.in_features
    inside = next(part for name, part in model.get_submodule(member.name).named_modules() if name.endswith("weight.0"))
    overlap = float((inside.get_parameter("fixed") @ member.secret_a.t()).square().sum()) / member.secret_a.shape[0]
    assert overlap > 0.6
