from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.serving.api_error import ApiError
from cloven.serving.body import DEEPEST, MOST_PARTS, parsed

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


@given(VALUES)
def test_what_is_sensible_is_read(value: Any) -> None:
    assert parsed(json.dumps(value).encode()) == value


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b'{"a": NaN}', "no JSON"),
        (b"[-Infinity]", "no JSON"),
        (b"1" * 33, "no JSON"),
        (b"[" * 10**6, "no JSON"),
        (nested(DEEPEST + 1), "deeper"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (json.dumps({"a": [0] * MOST_PARTS}).encode(), "parts"),
        (json.dumps({f"{i}": 0 for i in range(MOST_PARTS)}).encode(), "parts"),
        (json.dumps([[0] * 200] * 200).encode(), "parts"),
    ],
)
def test_what_is_not_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ApiError, match=why) as caught:
        parsed(data)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"


def test_as_large_as_can_be() -> None:
    value = [["text"] * 100] * 196
    assert parsed(json.dumps(value).encode()) == value
    assert parsed(nested(DEEPEST)) is not None


@pytest.mark.parametrize("data", [b'{"a": [' + b"0," * 500_000 + b"0]}", b'{"a": ' + nested(500) + b"}", b"9" * 2**20])
def test_refusing_takes_no_time(data: bytes) -> None:
    """Everybody waits for it: a tenth of a second on a machine like ours, and nobody's fault here is ten times that."""
    started = time.process_time()
    with pytest.raises(ApiError):
        parsed(data)
    assert time.process_time() - started < 1
