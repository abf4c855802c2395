from __future__ import annotations

import pytest

from cloven.slip.cards import exposed_card, trusted_card
from cloven.slip.config import SlipConfig
from cloven.slip.summary import Summary


def summary() -> Summary:
    result = Summary()
    result.add("lm_head", 100, 100, 2, 17.0, 41.5)
    return result


def test_the_trusted_card() -> None:
    text = trusted_card("my-model", "mit", SlipConfig(precision="int8x2"), summary())
    assert text.startswith("---\nlicense: mit\nlibrary_name: cloven\nbase_model: my-model\n---\n")
    for said in (
        "Secret.",
        "never copy it",
        "4.00%",
        "precision int8x2",
        "scramble mixing",
        "Licence of the base model: mit",
        "Not hidden",
    ):
        assert said in text


def test_the_exposed_card() -> None:
    text = exposed_card("my-model", "mit", SlipConfig())
    for said in ("license: mit", "cloven worker exposed --listen", "scrambled by a secret mixing", "Licence", "not hidden"):
        assert said in text
    assert "NOT scrambled" in exposed_card("my-model", "mit", SlipConfig(scramble="none"))


def test_a_split_without_scramble_says_so_loudly() -> None:
    assert "scramble none" in trusted_card("my-model", "mit", SlipConfig(scramble="none"), summary())


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
def test_no_placeholder_is_left(precision: str) -> None:
    config = SlipConfig(precision=precision)
    for text in (trusted_card("m", "mit", config, summary()), exposed_card("m", "mit", config)):
        assert "{" not in text and "}" not in text
