from __future__ import annotations

import functools
import json
from unittest.mock import patch

import pytest
import torch

from cloven.demo import private_lora
from cloven.demo.merged import merged_model
from cloven.demo.private_lora import BITS, PROMPTS, LoraDemo, run_lora_demo
from cloven.zoo.demo import demo_adapter_path, demo_model_path
from tests.lora_bundles import adapter_folder, merged, peft
from tests.split_models import demo_model, demo_tokenizer, tiny_folder

TOKENS = 6
STEPS: list[str] = []


@functools.cache
def demo() -> LoraDemo:
    """Two prompts of a few tokens, and a short text for the perplexity; run once."""
    with patch.multiple(private_lora, TEXT_SEQUENCES=2, TEXT_TOKENS=20):
        return run_lora_demo(lambda stage, done, total: STEPS.append(stage), 2, TOKENS)


def test_the_merged_model_is_pefts() -> None:
    with peft() as module:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
        expected = module.PeftModel.from_pretrained(base, demo_adapter_path()).merge_and_unload().state_dict()
    found, plain = merged_model(demo_model_path(), demo_adapter_path()).state_dict(), demo_model().state_dict()
    assert set(found) == set(expected) == set(plain)
    changed = 0
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name
        changed += not torch.equal(found[name], plain[name])
    assert changed == 35


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 stores its matrices transposed
def test_the_merged_model_is_pefts_in_other_families(family: str) -> None:
    found, expected = merged_model(tiny_folder(family), adapter_folder(family)).state_dict(), merged(family).state_dict()
    assert set(found) == set(expected)
    assert all(torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6) for name, tensor in expected.items())


def test_the_texts_are_pefts() -> None:
    result = demo()
    assert (result.prompts, result.new_tokens) == (2, TOKENS)
    assert result.tokens_identical_to_peft == 2 and result.tokens_different_from_base == 2
    assert result.example_prompt == PROMPTS[0] and result.example_text != result.example_base
    assert {"preparing", "generating", "perplexity"} <= set(STEPS)


def test_more_bits_make_a_smaller_error() -> None:
    errors = demo().error_by_bits
    assert list(errors) == ["16", "12", "10", "8"]
    assert 0 < errors["16"] < errors["12"] < errors["10"] < errors["8"] and errors["16"] < 1e-3


def test_perplexities() -> None:
    result = demo()
    assert result.perplexity_private == pytest.approx(result.perplexity_peft, rel=1e-2)
    assert result.perplexity_base > 5 * result.perplexity_peft and result.perplexity_tokens == 2 * 19


def test_the_ledger_counts_every_row_once() -> None:
    """The last token of every text is not asked about: the budget, counted from PEFT's texts, is not used up by as many rows."""
    result = demo()
    assert result.budget - result.queries_used == result.prompts
    lengths = [len(demo_tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS[:2]]
    assert result.queries_used == sum(length + TOKENS - 1 for length in lengths) + 2 * 20 + len(BITS) * lengths[0]


def test_what_it_costs() -> None:
    result = demo()
    assert result.queries_per_token == 20  # four groups in each of five layers
    assert result.bytes_up_per_token > 4 * 20 * (1280 + 256) and result.bytes_down_per_token < result.bytes_up_per_token / 20
    assert result.tokens_per_s_peft > 0 and result.tokens_per_s_private > 0 and result.mask_ms_per_token > 0


def test_as_json() -> None:
    record = json.loads(json.dumps(demo().to_dict()))
    assert set(record) == set(LoraDemo.__dataclass_fields__)
    issue = ("tokens_identical_to_peft", "perplexity_base", "perplexity_private", "perplexity_peft", "queries_used", "budget")
    assert set(issue) <= set(record)


def test_twenty_different_prompts() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 20


@pytest.mark.long
def test_twenty_texts_of_64_tokens() -> None:
    result = run_lora_demo(lambda stage, done, total: None)
    assert (result.prompts, result.new_tokens) == (20, 64)
    assert result.tokens_identical_to_peft >= 19 and result.tokens_different_from_base >= 19
    assert result.perplexity_private == pytest.approx(result.perplexity_peft, rel=1e-3)
    assert result.perplexity_base > 10 * result.perplexity_peft
    assert 0 < result.queries_used <= result.budget
