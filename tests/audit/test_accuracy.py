from __future__ import annotations

import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cloven.audit.accuracy import ModelAccuracy, measure
from cloven.errors import RunError
from tests.split_models import demo_model, logits, random_ids, tiny

WINDOWS = [random_ids(97, 1, length, seed=length)[0] for length in (9, 70, 2)]  # 70: more than one block of rows


class Answers:
    """A model that always gives the same logits."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.answer[None, : input_ids.shape[1]])


def oracle(model: Any, reference: Any, windows: list[Tensor]) -> ModelAccuracy:
    """One position after another, by the definitions."""
    surprise, first_surprise, same, differences = [], [], [], []
    for window in windows:
        ours, theirs = (logits(one, window[None])[0].double() for one in (model, reference))
        for position in range(len(window) - 1):
            token = int(window[position + 1])
            a, b = ours[position], theirs[position]
            surprise.append(-math.log(float(a[token].exp() / a.exp().sum())))
            first_surprise.append(-math.log(float(b[token].exp() / b.exp().sum())))
            same.append(int(a.argmax()) == int(b.argmax()))
            differences.append(math.sqrt(float(((a - b) ** 2).sum()) / float((b**2).sum())))
    perplexity, first = (math.exp(sum(values) / len(values)) for values in (surprise, first_surprise))
    change = perplexity / first - 1
    error = (1 + change) * statistics.pstdev(a - b for a, b in zip(surprise, first_surprise, strict=True)) / math.sqrt(len(same))
    return ModelAccuracy(perplexity, change, error, sum(same) / len(same), max(differences))


def test_every_figure_by_hand() -> None:
    models = {"reference": tiny("llama"), "other": tiny("mistral")}
    results = measure(models, WINDOWS)
    assert list(results) == ["reference", "other"]
    for name, model in models.items():
        expected = oracle(model, models["reference"], WINDOWS)
        assert results[name].perplexity == pytest.approx(expected.perplexity, rel=1e-9)
        assert results[name].perplexity_change == pytest.approx(expected.perplexity_change, rel=1e-9, abs=1e-12)
        assert results[name].perplexity_change_error == pytest.approx(expected.perplexity_change_error, rel=1e-9, abs=1e-12)
        assert results[name].agreement == expected.agreement
        assert results[name].largest_logit_difference == pytest.approx(expected.largest_logit_difference, rel=1e-9)
    assert 0 < results["other"].agreement < 0.5


def test_a_model_agrees_with_itself() -> None:
    results = measure({"one": demo_model(), "again": demo_model()}, WINDOWS)
    assert results["again"] == results["one"] == ModelAccuracy(results["one"].perplexity, 0.0, 0.0, 1.0, 0.0)


def test_progress_counts_windows() -> None:
    seen: list[tuple[str, int, int]] = []
    measure({"one": tiny("llama")}, WINDOWS, lambda *step: seen.append(step))
    assert seen == [("windows", 0, 3), ("windows", 1, 3), ("windows", 2, 3)]


def test_the_worst_models() -> None:
    """Certain of the wrong token: a perplexity that no float holds is cut off, not an overflow. No numbers at all: an error."""
    certain = torch.zeros(70, 97)
    certain[:, 0] = 1e6  # the windows hold no 0
    results = measure({"uniform": Answers(torch.zeros(70, 97)), "certain": Answers(certain)}, WINDOWS)  # type: ignore[dict-item]
    assert results["uniform"].perplexity == pytest.approx(97)
    assert results["certain"].perplexity == pytest.approx(math.exp(700)) and math.isfinite(results["certain"].perplexity_change)
    with pytest.raises(RunError, match="broken: the logits are not numbers"):
        measure({"broken": Answers(torch.full((70, 97), math.nan))}, WINDOWS)  # type: ignore[dict-item]
