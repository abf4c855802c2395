from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cloven.audit.slip import learned_scramble as module
from cloven.audit.slip import training
from cloven.audit.slip.learned_scramble import learned_scramble
from cloven.audit.slip.matching import Alignment
from cloven.audit.slip.training import Budget
from tests.audit.slip.subjects import demo_subject, named, tiny_subject
from tests.split_models import tiny


def data() -> Tensor:
    return torch.randint(1, 40, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RATES", (1e-3,))
    monkeypatch.setattr(training, "ENOUGH_TOKENS", 0)  # else no claim is made


def test_nothing_is_learnt_where_there_is_nothing_to_begin_with_and_nothing_is_lost_where_there_is() -> None:
    subject = replace(demo_subject(), groups=demo_subject().groups[:2])
    found = learned_scramble(subject, subject.text[:, :32], Budget(steps=3))
    bases, permutations = named(found, "mixing")["learned_bases"], named(found, "permutation")["learned_permutations"]
    for attack in (bases, permutations):
        assert attack.value < 0.02 and attack.verdict == "holds"
        assert attack.interval is not None and set(attack.details) == {"perplexity", "knowledge"}
    assert permutations.weakened_value >= 0.95  # begun at a planted near-duplicate
    assert bases.weakened_value > 0.8  # begun near the true bases


def test_with_a_relative_it_begins_there() -> None:
    subject = replace(tiny_subject(scramble="permutation"), relative=tiny("llama"))
    attack = named(learned_scramble(subject, data(), Budget(steps=3)))["learned_permutations"]
    assert attack.value > 0.9 and attack.verdict == "broken" and attack.adversary.endswith("who has a public relative")


def test_true_bases_give_the_exposed_matrix() -> None:
    group = tiny_subject().groups[0]
    rows, columns = (torch.linalg.inv(basis).t() for basis in (group.seen.rows, group.seen.columns))
    bases = module._Bases(group, (rows, columns))
    with torch.no_grad():
        bases.compute()
    assert float((bases.matrix - group.exposed).norm() / group.exposed.norm()) < 0.03


def test_a_known_order_gives_the_exposed_matrix() -> None:
    """The soft permutations, begun at the truth and sure of it, are the unscrambling."""
    subject = tiny_subject(scramble="permutation")
    group = subject.groups[0]
    codes, exposed = group.coarse(), group.exposed
    rows, columns = group.seen.rows.abs().argmax(1), group.seen.columns.abs().argmax(1)
    signs = module.aligned_to(codes, exposed / (group.sizes()[0][:, None] * group.sizes()[1]))
    assert torch.equal(signs.rows, rows) and torch.equal(signs.columns, columns)
    order = module._Order(group, Alignment(rows, columns, signs.row_signs, signs.column_signs), subject.random("x"))
    with torch.no_grad():
        order.rows.mul_(10)
        order.columns.mul_(10)
        order.compute()
    assert float((order.matrix - exposed).norm() / exposed.norm()) < 0.05


def test_gradients_reach_places_and_signs() -> None:
    subject = tiny_subject(scramble="permutation")
    model = module._model(subject, [None] * len(subject.groups))
    with torch.enable_grad():
        model(input_ids=data(), labels=data(), use_cache=False).loss.backward()
    learnt = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learnt == {"rows", "columns", "row_signs", "column_signs"}
    assert all(parameter.grad is None for parameter in subject.plain.parameters())


def test_not_without_a_scramble_and_not_on_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert learned_scramble(demo_subject(scramble="none"), data(), Budget(steps=3)) == []
    monkeypatch.setattr(module, "MOST_PLACES", 16)
    assert learned_scramble(tiny_subject(), data(), Budget(steps=3)) == []
