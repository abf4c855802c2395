from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from cloven.zoo.demo import demo_model_path
from tests.split_models import demo_model, demo_tokenizer, greedy


def test_it_is_a_complete_directory_of_at_most_10_megabytes() -> None:
    names = {path.name for path in demo_model_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in demo_model_path().iterdir()) <= 10 * 10**6
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt", ".pkl"))]


def test_its_card_says_what_it_is_and_under_which_licence() -> None:
    card = (demo_model_path() / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "\nlicense: " in card.split("---")[1]
    assert "Shakespeare" in card and len(card) > 400


def test_its_configuration_has_nothing_of_ours_and_runs_no_code() -> None:
    record = json.loads((demo_model_path() / "config.json").read_text())
    assert "auto_map" not in record and "quantization_config" not in record and record["model_type"] == "llama"
    assert demo_model().num_parameters() > 4_000_000


@given(st.text())
def test_the_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= token < demo_model().config.vocab_size for token in ids)


@given(st.binary())
def test_the_tokenizer_gives_back_any_bytes(data: bytes) -> None:
    """Bytes as they come from a file of unknown encoding, read as Latin-1: every byte is a character."""
    text = data.decode("latin-1")
    tokenizer = demo_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_adds_nothing_to_a_prompt() -> None:
    assert demo_tokenizer()("ROMEO:")["input_ids"] == demo_tokenizer()("ROMEO:", add_special_tokens=False)["input_ids"]
    assert demo_tokenizer()("")["input_ids"] == []


def test_it_writes_something_like_english() -> None:
    text = demo_tokenizer().decode(greedy(demo_model(), "ROMEO:", 24))
    words = text.split()
    assert len(words) > 8 and sum(word.strip(",.:;!?'-").isalpha() for word in words) > 0.7 * len(words)
