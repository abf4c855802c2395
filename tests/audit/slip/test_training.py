from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from cloven.audit.slip import training as module
from cloven.audit.slip.training import LEAST_STEPS, Budget, Start, TooLittleTime, steps_of, train, trainable, training_text
from cloven.zoo.text import perplexity
from tests.audit.slip.subjects import demo_subject


def whole(distilled: bool = False) -> Start:
    return Start(lambda: trainable(demo_subject(), lambda group, part: group.weight(part)), distilled)


def test_steps_follow_the_time() -> None:
    subject, data = demo_subject(), demo_subject().text[:, :32]
    with torch.enable_grad():
        assert steps_of(subject, [whole()], data, Budget(60.0)) > LEAST_STEPS
        assert steps_of(subject, [whole()], data, Budget(0.0, steps=7)) == 7
        run = train(subject, whole(), data, 4)
    assert [tokens for tokens, _ in run.curve] == [done * module.BATCH * module.WINDOW for done in (1, 3, 4)]


def test_a_budget_that_is_too_small_is_not_overrun() -> None:
    """One training is tried, and not all of them, before it is said how long they would take."""
    subject, tried = demo_subject(), list[int]()

    def made() -> PreTrainedModel:
        tried.append(1)
        return whole().model()

    with torch.enable_grad(), pytest.raises(TooLittleTime, match="5 trainings of 3 steps would take about"):
        steps_of(subject, [Start(made)] * 5, subject.text[:, :32], Budget(1e-3))
    assert len(tried) == 1
    assert Budget(8.0, 3).part(0.25) == Budget(2.0, 3)


def test_the_best_model_on_the_way_counts() -> None:
    subject = demo_subject()
    with torch.enable_grad():
        run = train(subject, Start(whole().model, rate=0.5), subject.text[:, :32], 2)
    assert run.before == pytest.approx(perplexity(subject.plain, subject.text)) and run.perplexity == run.before < run.curve[-1][1]


def test_few_tokens_are_no_claim() -> None:
    assert [module.enough(verdict, module.ENOUGH_TOKENS - 1) for verdict in ("holds", "measured", "broken")] == [
        "measured",
        "measured",
        "broken",
    ]
    assert module.enough("holds", module.ENOUGH_TOKENS) == "holds"
    assert module.few("holds", 5) == "; no claim on fewer than 20,000 tokens"
    assert module.few("broken", 5) == module.few("holds", 10**6) == ""


def test_the_best_rate_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, data = demo_subject(), demo_subject().text[:, :32]
    monkeypatch.setattr(module, "RATES", (0.5, 1e-4))
    with torch.enable_grad():
        assert train(subject, whole(), data, 1).rate == 1e-4 and train(subject, Start(whole().model, rate=0.1), data, 1).rate == 0.1


def test_distillation_learns_from_the_models_distributions() -> None:
    """Two models that differ in what their teacher says of one text."""
    subject, text = demo_subject(), torch.full((8, 32), 7)
    with torch.enable_grad():
        by_text, distilled = (train(subject, whole(way), text, 3).model for way in (False, True))
    with torch.no_grad():
        said = [
            model(input_ids=text[:1], use_cache=False).logits.log_softmax(-1)[0, -1, 7] for model in (subject.plain, by_text, distilled)
        ]
    assert said[1] > said[0] + 1 > said[2]  # the text says token 7 over and over; the teacher doesn't


def test_text_to_train_on_is_not_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SEQUENCES", 4)
    monkeypatch.setattr(module, "SAMPLED_AT_A_TIME", 2)
    monkeypatch.setattr(module, "WINDOW", 32)
    monkeypatch.setattr(module, "BATCH", 2)
    data = training_text(demo_subject(), Budget())
    assert data.shape == (4, 32) and torch.equal(data, training_text(demo_subject(), Budget()))
    assert not torch.equal(data[:2], demo_subject().text[:2, :32]) and not torch.equal(data[:2], data[2:])
    monkeypatch.setattr(module, "_SAMPLING", 0.0)
    assert training_text(demo_subject(), Budget(60)).shape == (2, 32)  # no time for more
    with pytest.raises(TooLittleTime, match="to sample one batch"):
        training_text(demo_subject(), Budget(1e-3))
