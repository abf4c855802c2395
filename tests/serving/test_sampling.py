from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from cloven.serving.sampling import KWARG, PerRequest, Sampler, alone_for, processors, sampler_of
from tests.served import plain_model

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])


def config(**settings: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, **{"top_k": 0, **settings})


def shares(sampler: Sampler, logits: torch.Tensor = LOGITS, draws: int = 4000) -> torch.Tensor:
    return torch.bincount(torch.tensor([sampler.choose([0], logits.clone()) for _ in range(draws)]), minlength=len(logits)) / draws


def test_temperature_one_is_the_softmax() -> None:
    assert float((shares(Sampler(config(), 1)) - torch.softmax(LOGITS, 0)).abs().max()) < 0.03


def test_temperature_top_k_and_top_p() -> None:
    assert float((shares(Sampler(config(temperature=2.0), 1)) - torch.softmax(LOGITS / 2, 0)).abs().max()) < 0.03
    assert shares(Sampler(config(top_k=2), 1), draws=500)[2:].sum() == 0
    assert shares(Sampler(config(top_p=0.5), 1), draws=200).tolist() == [1, 0, 0, 0, 0]
    for coldest in ({"temperature": 1e-3}, {"temperature": 1e-5}, {"top_p": 1e-300}):  # and no logits of a model overflow
        assert shares(Sampler(config(**coldest), 1), 1000 * LOGITS, draws=50).tolist() == [1, 0, 0, 0, 0]


def test_a_seed_and_none() -> None:
    flat = torch.zeros(1000)

    def chosen(sampler: Sampler) -> list[int]:
        return [sampler.choose([0], flat.clone()) for _ in range(8)]

    assert chosen(Sampler(config(), 5)) == chosen(Sampler(config(), 5)) != chosen(Sampler(config(), 6))
    assert chosen(Sampler(config(), None)) != chosen(Sampler(config(), None))
    torch.manual_seed(0)
    first = chosen(Sampler(config(), None))
    torch.manual_seed(0)
    assert chosen(Sampler(config(), None)) != first


def test_its_randomness_is_not_copied() -> None:
    """transformers copies a request's settings when it begins it anew."""
    sampler = Sampler(config(), 1)
    assert copy.deepcopy({KWARG: sampler})[KWARG] is sampler


def request(sampler: Sampler | None) -> Any:
    wishes = {} if sampler is None else {KWARG: sampler}
    state = SimpleNamespace(logit_processor_kwargs=wishes, initial_tokens=[4], generated_tokens=[0])
    return SimpleNamespace(state=state, has_new_token=True)


def test_rows_of_a_batch_each_by_its_own() -> None:
    """Row 1 may only take its likeliest token but one; rows 0 and 2 are greedy, and not touched."""
    chosen = processors()
    storage = torch.zeros(1, 8, dtype=torch.int32)
    rows = torch.stack([LOGITS, LOGITS.flip(0), LOGITS + 1])
    waiting = request(Sampler(config(), 1))
    waiting.has_new_token = False
    chosen.prepare_tensor_args([request(None), waiting, request(Sampler(config(temperature=1e-3), 1)), request(None)], storage)
    scores = chosen(torch.zeros(3, 1, dtype=torch.long), rows.clone(), storage)
    assert torch.equal(scores[0], rows[0]) and torch.equal(scores[2], rows[2])
    assert int(scores[1].argmax()) == 4 and int(torch.isinf(scores[1]).sum()) == 4
    assert chosen.do_processing and chosen.tensors_required == 1


def test_rows_that_are_not_there() -> None:
    processor = PerRequest()
    processor.prepare_tensor_args([request(None), request(None)])
    with pytest.raises(RuntimeError, match="fewer rows"):
        processor(LOGITS[None], torch.zeros(2))


def test_a_repetition_penalty_knows_prompt_and_answer() -> None:
    """Tokens 0 (of the answer) and 4 (of the prompt) are the likeliest, and were there before."""
    sampler = sampler_of(GenerationConfig(do_sample=False, repetition_penalty=1e6), None)
    assert sampler is not None
    chosen = processors()
    storage = torch.zeros(1, 8, dtype=torch.int32)
    chosen.prepare_tensor_args([request(sampler)], storage)
    rows = torch.tensor([[5.0, 1.0, 2.0, 1.5, 6.0]])
    assert int(chosen(torch.zeros(1, 1, dtype=torch.long), rows, storage).argmax()) == 2


def test_who_needs_no_sampler() -> None:
    assert sampler_of(GenerationConfig(do_sample=False), 1) is None
    assert sampler_of(GenerationConfig(do_sample=False, repetition_penalty=1.0), 1) is None
    assert sampler_of(GenerationConfig(do_sample=True), 1) is not None


def test_what_the_batch_can_do() -> None:
    """Among them what many models' files spell out."""
    for settings in (
        {"do_sample": True, "temperature": 0.3, "top_p": 0.4, "top_k": 7, "max_new_tokens": 5, "eos_token_id": [1, 2], "pad_token_id": 0},
        {"output_attentions": False, "output_hidden_states": False, "use_cache": True, "_from_model_config": True},
        {"num_beams": 1, "min_length": 0, "repetition_penalty": 1.05, "length_penalty": 1.0, "no_repeat_ngram_size": 0},
        plain_model()[0].generation_config.to_dict(),
    ):
        assert alone_for(GenerationConfig(**settings)) == [], settings


def test_what_the_batch_cannot_do() -> None:
    for settings in (
        {"min_p": 0.1},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 4},
        {"num_beams": 2},
        {"suppress_tokens": [3]},
        {"cache_implementation": "static"},
        {"exponential_decay_length_penalty": (5, 1.1)},
    ):
        assert alone_for(GenerationConfig(**settings)) == list(settings), settings
