from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.errors import BadBundle
from cloven.kv_shield.shapes import AttentionShape, calls_of, parse_attention
from tests.kv_bundles import SHAPE

PATH = Path("manifest.json")
GOOD: dict[str, Any] = json.loads(json.dumps(SHAPE.to_dict()))
EPSILON = st.none() | st.floats(0, 1, exclude_max=True)
SHAPES = st.builds(
    lambda name, groups, per, d, fused, rotary, epsilon: AttentionShape(
        name, groups * per, groups, d, ("qkv",) if fused else ("q", "k", "v"), "o", rotary, epsilon
    ),
    st.text(max_size=20),
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 512),
    st.booleans(),
    st.booleans(),
    EPSILON,
)


def test_widths() -> None:
    assert SHAPE.widths() == (48, 24, 24)
    assert SHAPE.widths(16) == (4 * 28, 2 * 28, 2 * 28)


@given(SHAPES)
def test_round_trip(shape: AttentionShape) -> None:
    assert parse_attention(json.loads(json.dumps(shape.to_dict())), PATH) == shape


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"name": 3},
        {"heads": 0},
        {"heads": -4},
        {"heads": 2**16},
        {"heads": 4.0},
        {"heads": True},
        {"heads": "4"},
        {"heads": 3},  # kv_heads 2 does not divide it
        {"kv_heads": 0},
        {"kv_heads": 3},
        {"kv_heads": 8},
        {"head_dim": 0},
        {"head_dim": None},
        {"projections": []},
        {"projections": ["q", "k"]},
        {"projections": ["q", "k", "v", "w"]},
        {"projections": "qkv"},
        {"projections": [1, 2, 3]},
        {"projections": None},
        {"output": 1},
        {"rotary": 1},
        {"rotary": "yes"},
        {"norm_epsilon": 1},
        {"norm_epsilon": -1e-6},
        {"norm_epsilon": 1.0},
        {"norm_epsilon": float("nan")},
        {"norm_epsilon": False},
        {"extra": 1},
        {"rotary": ...},
        {"name": ...},
    ],
    ids=str,
)
def test_malformed(change: dict[str, Any]) -> None:
    record = {key: value for key, value in (GOOD | change).items() if value is not ...}
    with pytest.raises(BadBundle, match="an attention layer"):
        parse_attention(record, PATH)


@pytest.mark.parametrize("record", [None, [], "x", 3, {}, [GOOD]])
def test_no_record(record: object) -> None:
    with pytest.raises(BadBundle):
        parse_attention(record, PATH)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(GOOD)), JSON)
def test_any_field_replaced(name: str, value: Any) -> None:
    try:
        shape = parse_attention({**GOOD, name: value}, PATH)
    except BadBundle:
        return
    assert shape.heads % shape.kv_heads == 0 and shape.head_dim > 0  # what is accepted is usable
    assert json.loads(json.dumps(shape.to_dict())) == {**GOOD, name: value}


@pytest.mark.parametrize(("rotary", "noise", "kinds"), [(True, 0, 2), (False, 0, 1), (False, 16, 2), (True, 16, 2)])
def test_calls_of_a_pass(rotary: bool, noise: int, kinds: int) -> None:
    layers = [replace(SHAPE, rotary=rotary)] * 3
    calls = calls_of(layers, noise)
    assert calls == [(layer, key) for layer in range(3) for key in (True, False)[2 - kinds :]]
