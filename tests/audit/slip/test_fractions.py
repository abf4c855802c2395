from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from cloven.audit.slip import fractions
from cloven.audit.slip.fractions import FRACTIONS, curve_over_fractions, spectra_figures
from cloven.zoo.text import perplexity
from tests.audit.slip.subjects import based_subject, demo_subject
from tests.split_models import demo_model


def test_more_secret_is_worth_less() -> None:
    subject = demo_subject()
    (figure,) = curve_over_fractions(subject)
    fillings = {"zero in the secret's place", "a random part"}
    assert set(figure.series) == {*fillings, *(f"{name}; no gifts" for name in fillings), "the whole model"}
    points = dict(figure.series["zero in the secret's place"])
    assert list(points) == [100 * fraction for fraction in FRACTIONS]
    whole = perplexity(subject.plain, subject.text)
    assert whole * 3 < points[0.5] < points[10.0]
    assert all(dict(figure.series["a random part"])[x] > y for x, y in points.items())  # worse than nothing
    assert min(dict(figure.series["zero in the secret's place; no gifts"]).values()) > 10 * whole
    assert set(dict(figure.series["the whole model"]).values()) == {whole}


def test_a_relative_that_is_the_model_gives_the_secret_away() -> None:
    (figure,) = curve_over_fractions(replace(demo_subject(), relative=demo_model()))
    assert max(dict(figure.series["the relative's own part"]).values()) < 1.2 * min(dict(figure.series["the whole model"]).values())


def test_the_curve_of_a_fine_tune_lies_between_the_base_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fractions, "FRACTIONS", (0.005, 0.4))
    tried, put = list[list[Tensor]](), fractions._with
    monkeypatch.setattr(fractions, "_with", lambda subject, matrices: tried.append(list(matrices)) or put(subject, matrices))
    subject = based_subject()
    (figure,) = curve_over_fractions(subject)
    points, base, whole = (dict(figure.series[name]) for name in ("the exposed half", "the public base", "the whole model"))
    assert list(points) == [0.5, 40.0] and base[0.5] == base[40.0] != whole[0.5]
    bases = [subject.relative_weight(member) for group in subject.groups for member, _ in group.parts]
    weights = [group.weight(part) for group in subject.groups for part in range(len(group.parts))]
    little, much = (sum(float((m - b).square().sum()) for m, b in zip(one, bases, strict=True)) for one in tried)
    change = sum(float((w - b).square().sum()) for w, b in zip(weights, bases, strict=True))
    assert 0.9 * change < little < change and much < 0.5 * change  # the more is secret, the nearer to the base


def test_no_curve_where_the_base_is_not_named() -> None:
    assert curve_over_fractions(replace(based_subject(), relative=None)) == []


def test_a_large_model_has_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fractions, "MOST_ENTRIES", 1000)
    assert curve_over_fractions(demo_subject()) == []


def test_singular_values_with_the_secret_part_marked() -> None:
    figures = spectra_figures(demo_subject())
    figure = figures[0]
    model, exposed = (dict(figure.series[name]) for name in ("the model's", "the exposed half's"))
    marks = [one.mark or 0.0 for one in figures]
    assert len({one.name for one in figures}) == len(figures) == 4 and marks == sorted(marks, reverse=True) and marks[-1] > 1
    assert model[1.0] > 1.5 * exposed[1.0]  # the top is gone, and the hole is filled
    assert 0.5 < min(exposed.values()) / min(model.values()) < 2


def test_nothing_secret_nothing_marked() -> None:
    subject = demo_subject()
    member = subject.groups[0].parts[0][0]
    assert member.secret_a.shape[0] >= 0
    without = [group for group in subject.groups if all(not part.secret_a.shape[0] for part, _ in group.parts)]
    assert not without or spectra_figures(replace(subject, groups=tuple(without))) == []
