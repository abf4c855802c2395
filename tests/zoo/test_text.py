from __future__ import annotations

import math

import pytest
import torch

from cloven.zoo.text import PROMPTS, perplexity, sample_text
from tests.split_models import demo_model, demo_tokenizer, logits, tiny


def test_twenty_different_prompts() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 20
    assert all(len(demo_tokenizer()(prompt)["input_ids"]) < 32 for prompt in PROMPTS)


def test_sampled_text_repeats_with_its_seed() -> None:
    text = sample_text(tiny("llama"), 3, 9, seed=1)
    assert text.shape == (3, 9) and text.dtype == torch.int64 and bool((text[:, 0] == 0).all())
    assert torch.equal(text, sample_text(tiny("llama"), 3, 9, seed=1))
    assert not torch.equal(text, sample_text(tiny("llama"), 3, 9, seed=2))


def test_perplexity_by_hand() -> None:
    ids = torch.randint(1, 97, (5, 7), generator=torch.Generator().manual_seed(0))
    probabilities = torch.softmax(logits(tiny("llama"), ids).double(), -1)
    likelihood = [math.log(float(probabilities[row, t, ids[row, t + 1]])) for row in range(5) for t in range(6)]
    assert perplexity(tiny("llama"), ids, batch=2) == pytest.approx(math.exp(-sum(likelihood) / 30), rel=1e-6)


def test_a_model_is_least_surprised_by_its_own_text() -> None:
    own = perplexity(demo_model(), sample_text(demo_model(), 2, 64))
    noise = perplexity(demo_model(), torch.randint(1, 1024, (2, 64), generator=torch.Generator().manual_seed(0)))
    assert 3 < own < 60 < 300 < noise
