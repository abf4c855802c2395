from __future__ import annotations

import pytest
import torch

from cloven.audit.slip import training as module
from cloven.audit.slip.training import LEAST_STEPS, Start, steps_that_fit, train, trainable, training_text
from cloven.zoo.text import perplexity
from tests.audit.slip.subjects import demo_subject


def whole(distilled: bool = False) -> Start:
    return Start(lambda: trainable(demo_subject(), lambda group, part: group.weight(part)), distilled)


def test_steps_follow_the_time() -> None:
    subject, data = demo_subject(), demo_subject().text[:, :32]
    with torch.enable_grad():
        assert steps_that_fit(subject, [whole()], data, 0.0) == LEAST_STEPS
        assert steps_that_fit(subject, [whole()], data, 60.0) > LEAST_STEPS
        run = train(subject, whole(), data, 4)
    assert [tokens for tokens, _ in run.curve] == [done * module.BATCH * module.WINDOW for done in (1, 3, 4)]


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
    monkeypatch.setattr(module, "MOST_SEQUENCES", 2)
    monkeypatch.setattr(module, "WINDOW", 32)
    data = training_text(demo_subject())
    assert data.shape == (2, 32) and torch.equal(data, training_text(demo_subject()))
    assert not torch.equal(data, demo_subject().text[:2, :32])
