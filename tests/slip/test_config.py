from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from cloven.errors import BadInput
from cloven.slip.config import PRECISIONS, SlipConfig


def test_defaults_are_the_safe_ones() -> None:
    config = SlipConfig()
    assert config == SlipConfig(secret_fraction=0.03, rank=None, precision="int8", scramble="mixing", origin="private")
    assert config.terms == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_terms(precision: str) -> None:
    assert SlipConfig(precision=precision).terms == {"int8": 1, "int8x2": 2}[precision]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"secret_fraction": -0.01}, "from 0 to 0.5"),
        ({"secret_fraction": 0.51}, "from 0 to 0.5"),
        ({"secret_fraction": float("nan")}, "from 0 to 0.5"),
        ({"secret_fraction": float("inf")}, "from 0 to 0.5"),
        ({"secret_fraction": 3}, "0.03 is 3 %"),
        ({"rank": -1}, "rank -1"),
        ({"precision": "int4"}, "int8, int8x2"),
        ({"precision": "INT8"}, "int8, int8x2"),
        ({"origin": "secret"}, "private, public-base, adapter"),
        ({"origin": "public-base"}, "scramble: a public relative undoes it"),
        ({"origin": "adapter"}, "scramble: a public relative undoes it"),
        ({"origin": "adapter", "scramble": "none", "rank": 2}, "it has the adapter's rank"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        SlipConfig(**settings)


@pytest.mark.parametrize("fraction", [0, 0.0, 0.5])
def test_the_ends_of_the_range_are_allowed(fraction: float) -> None:
    assert SlipConfig(secret_fraction=fraction).secret_fraction == fraction


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SlipConfig().scramble = "none"  # type: ignore[misc]


def test_as_json() -> None:
    config = SlipConfig(0.1, 3, "int8x2", "none")
    assert config.to_dict() == {"secret_fraction": 0.1, "rank": 3, "precision": "int8x2", "scramble": "none", "origin": "private"}
    assert SlipConfig(**config.to_dict()) == config
