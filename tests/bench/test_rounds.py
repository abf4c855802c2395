from __future__ import annotations

import json

import pytest

from cloven.bench import rounds
from cloven.bench.rounds import TEXTS, bench_rounds
from cloven.errors import BadInput
from tests.split_models import demo_bundle, tiny_folder

STEPS: list[str] = []


def progress(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total
    STEPS.append(stage)


def test_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "prepare_slip", lambda *_: demo_bundle("int8x2"))
    result = bench_rounds(progress, tokens=6, rtts_ms=(10.0,), rounds=1)
    assert result.assistant_is_the_model and result.model == "demo_model" and "generating" in STEPS
    found = {(figures.text, figures.drafts): figures for figures in result.results}
    assert set(found) == {(text, drafts) for text in TEXTS for drafts in ("plain", "prompt lookup", "assistant")}
    for (text, drafts), figures in found.items():
        assert figures.tokens_identical and figures.new_tokens == 6 and set(figures.tokens_per_s) == {"0", "10"}
        if drafts == "plain":
            assert 21 <= figures.exchanges_per_token < 21.5  # one message more, after a prompt of more rows than have no header here
            assert figures.rows_per_token == pytest.approx(5 / 6)
        else:
            assert figures.exchanges_per_token <= 21 and figures.rows_per_token >= found[text, "plain"].rows_per_token
        at_most = 1 / (figures.exchanges_per_token * 0.01)
        assert 0 < figures.tokens_per_s["10"] < min(at_most, figures.tokens_per_s["0"])
    assert found["ordinary", "assistant"].exchanges_per_token < 14
    assert json.loads(json.dumps(result.to_dict()))["results"][0]["text"] == "repetitive"


def test_what_is_refused_before_anything_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "prepare_slip", lambda *_: pytest.fail("prepared"))
    with pytest.raises(BadInput, match="its vocabulary has 97"):
        bench_rounds(progress, assistant=str(tiny_folder("llama")))
    with pytest.raises(BadInput, match="no such model directory"):
        bench_rounds(progress, "/nowhere")
    with pytest.raises(BadInput, match="simulated round trip 0"):
        bench_rounds(progress, rtts_ms=(1.0, 0.0))
    with pytest.raises(BadInput, match="give 1 or more"):
        bench_rounds(progress, prompt_lookup=0)
    with pytest.raises(BadInput, match="choose auto, float32"):
        bench_rounds(progress, dtype="float64")
