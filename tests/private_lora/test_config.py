from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.errors import BadInput
from cloven.masks.lwe_parameters import lwe_parameters
from cloven.private_lora.config import MOST_TOKENS, PrivateLoraConfig, revealed_share


def test_what_is_not_given() -> None:
    config = PrivateLoraConfig(100)
    assert (config.bits, config.hint, config.client_share, config.parameters) == (16, "lwe", 100, lwe_parameters("lwe"))
    assert PrivateLoraConfig(100, 40, 8, "statistical").parameters == lwe_parameters("statistical")
    assert PrivateLoraConfig(100, 40).client_share == 40


def test_a_budget_has_no_default() -> None:
    with pytest.raises(TypeError):
        PrivateLoraConfig()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 7}, "bits 7"),
        ({"bits": 17}, "bits 17"),
        ({"bits": 31}, "bits 31"),
        ({"bits": 16.0}, "bits"),
        ({"bits": True}, "bits"),
        ({"budget_tokens": 0}, "budget-tokens 0"),
        ({"budget_tokens": -1}, "budget-tokens -1"),
        ({"budget_tokens": 1.5}, "budget-tokens"),
        ({"budget_tokens": MOST_TOKENS + 1}, "budget-tokens"),
        ({"budget_tokens": True}, "budget-tokens True"),
        ({"client_tokens": 0}, "client-tokens 0"),
        ({"client_tokens": 101}, "client-tokens 101: more than the budget"),
        ({"hint": "none"}, "choose lwe or statistical"),
    ],
    ids=str,
)
def test_refusals_name_the_setting(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        PrivateLoraConfig(**{"budget_tokens": 100, **settings})


@given(st.integers(8, 16), st.integers(1, MOST_TOKENS), st.data())
def test_everything_else_is_allowed(bits: int, budget: int, data: st.DataObject) -> None:
    share = data.draw(st.none() | st.integers(1, budget))
    config = PrivateLoraConfig(budget, share, bits)
    assert 1 <= config.client_share <= budget


def test_the_revealed_share() -> None:
    """About h·d/b rows are all of a matrix whose weights have h bits each."""
    assert revealed_share(2048, 4096, 16, 8.0) == 1.0
    assert revealed_share(1024, 4096, 16, 8.0) == 0.5
    assert revealed_share(512, 4096, 16, 4.0) == 0.5
    assert revealed_share(10**9, 4096, 16, 8.0) == 1.0
    assert revealed_share(1, 4096, 8, 8.0) == 1 / 4096
    assert revealed_share(1, 4096, 8, 0.0) > 0
