from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import cloven
from cloven.model.adapter import read_adapter
from cloven.zoo.demo import demo_adapter_path, demo_model_path
from cloven.zoo.text import perplexity
from tests.lora_bundles import peft
from tests.split_models import demo_model, demo_tokenizer

PROSE = "The church was built in the early 18th century , and was part of the town until it was closed in 1965 . "


def test_it_is_a_complete_peft_directory_of_at_most_one_megabyte() -> None:
    files = {path.name: path.stat().st_size for path in demo_adapter_path().iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert sum(files.values()) <= 10**6


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from (name, *strings(entry))
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)
    elif isinstance(value, str):
        yield value


def test_its_configuration_names_no_path_of_any_machine() -> None:
    record = json.loads((demo_adapter_path() / "adapter_config.json").read_text(encoding="utf-8"))
    assert record["peft_type"] == "LORA" and record["r"] == 8 and record["base_model_name_or_path"] == "cloven-demo"
    assert [text for text in strings(record) if any(mark in text for mark in "/\\~:")] == []
    header = (demo_adapter_path() / "adapter_model.safetensors").read_bytes()[:20_000]
    assert not [mark for mark in (b"/home", b"/work", b"/root", b"/tmp", b"/Users") if mark in header]


def test_its_card_says_what_it_is_and_under_which_licence() -> None:
    card = (demo_adapter_path() / "README.md").read_text(encoding="utf-8")
    front = card.split("---")[1]
    assert "\nlicense: cc-by-sa-3.0" in front and "library_name: peft" in front
    assert "WikiText-2" in card and "scripts/train_demo_adapter.py" in card


def test_it_adapts_every_linear_but_the_head() -> None:
    modules = read_adapter(demo_adapter_path()).modules
    linears = {name for name, module in demo_model().named_modules() if isinstance(module, torch.nn.Linear)}
    assert {module.name for module in modules} == linears - {"lm_head"} and len(modules) == 35
    assert all(module.a.shape[0] == 8 and bool(module.b.any()) and module.scale == 2.0 for module in modules)


def test_peft_loads_it_and_it_makes_prose() -> None:
    base = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    ids = demo_tokenizer()(PROSE, return_tensors="pt")["input_ids"]
    alone = perplexity(base, ids)
    with peft() as module:
        adapted = module.PeftModel.from_pretrained(base, demo_adapter_path()).eval()
        assert sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name) == 183_040
        assert perplexity(adapted, ids) < 0.2 * alone


def test_it_is_part_of_the_public_api() -> None:
    assert cloven.demo_adapter_path() == demo_adapter_path()
