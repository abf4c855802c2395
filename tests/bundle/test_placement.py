from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.bundle.manifest import ExposedGroup
from cloven.bundle.placement import WHOLE, Part, parse_part, parts
from cloven.errors import BadInput

SIZES = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=30)


def groups_of(sizes: list[tuple[int, int]]) -> list[ExposedGroup]:
    return [ExposedGroup(rows, columns, "x.safetensors", f"g{number}", "0" * 64) for number, (rows, columns) in enumerate(sizes)]


def test_whole() -> None:
    groups = groups_of([(7, 3), (1, 1)])
    assert [WHOLE.rows(index, groups) for index in range(2)] == [range(7), range(1)]
    assert str(WHOLE) == "" and parse_part("") is WHOLE


@given(SIZES, st.data())
def test_layers_cover_every_group_once_in_order(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    groups = groups_of(sizes)
    of = data.draw(st.integers(1, len(groups)))
    held = [[index for index in range(len(groups)) if part.rows(index, groups)] for part in parts("layers", of, groups)]
    assert [index for one in held for index in one] == list(range(len(groups)))  # exactly once, in order
    assert all(held)  # none is empty
    for part in parts("layers", of, groups):
        assert all(part.rows(index, groups) in (range(0), range(groups[index].rows)) for index in range(len(groups)))  # whole groups


@given(SIZES, st.data())
def test_layers_are_balanced(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    """No part is larger than its fair share by more than the largest group, which cannot be cut."""
    groups = groups_of(sizes)
    of = data.draw(st.integers(1, len(groups)))
    weight = [group.rows * group.columns for group in groups]
    for part in parts("layers", of, groups):
        size = sum(weight[index] for index in range(len(groups)) if part.rows(index, groups))
        assert size <= sum(weight) / of + max(weight)


@pytest.mark.parametrize(("count", "of"), [(32, 2), (32, 4), (33, 3), (7, 7), (5, 1)])
def test_equal_groups_are_cut_evenly(count: int, of: int) -> None:
    groups = groups_of([(10, 10)] * count)
    sizes = [sum(1 for index in range(count) if part.rows(index, groups)) for part in parts("layers", of, groups)]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("sizes", [[(1, 1), (1, 1), (1000, 1000)], [(1000, 1000), (1, 1), (1, 1)], [(1, 1), (1000, 1000), (1, 1)]])
def test_a_giant_leaves_something_to_everybody(sizes: list[tuple[int, int]]) -> None:
    groups = groups_of(sizes)
    assert [[bool(part.rows(index, groups)) for index in range(3)] for part in parts("layers", 3, groups)] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


@given(SIZES, st.data())
def test_rows_cover_every_row_once_in_order(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    groups = groups_of(sizes)
    of = data.draw(st.integers(1, min(64, *(group.rows for group in groups), 64)))
    for index, group in enumerate(groups):
        held = [part.rows(index, groups) for part in parts("rows", of, groups)]
        assert held[0].start == 0 and held[-1].stop == group.rows
        assert all(one.stop == other.start for one, other in itertools.pairwise(held))
        counts = [len(one) for one in held]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1 and sum(counts) == group.rows


@given(st.sampled_from(["layers", "rows"]), st.integers(1, 4096), st.data())
def test_text_and_back(kind: str, of: int, data: st.DataObject) -> None:
    part = Part(kind, data.draw(st.integers(1, of)), of)
    assert parse_part(str(part)) == (part if of > 1 else WHOLE)


@pytest.mark.parametrize(
    "text",
    [
        *("layers", "layers:", "layers:1", "layers:/2", "layers:0/2", "layers:3/2", "layers:1/0", "layers:01/2", "layers:1/02"),
        *("layers:-1/2", "layers:1/-2", "layers: 1/2", "layers:1/2 ", "layers:1/2\n", "Layers:1/2", "columns:1/2", "rows:1/2/3", ":1/2"),
        *("rows:1/4097", "rows:1/10000", "rows:1/99999999999999999999", "rows:\u0661/2", "1/2", "whole", " "),
    ],
)
def test_no_parts(text: str) -> None:
    with pytest.raises(BadInput, match="give layers:NUMBER/OF or rows:NUMBER/OF"):
        parse_part(text)


@given(st.text(max_size=20))
def test_any_text_is_a_part_or_refused(text: str) -> None:
    try:
        part = parse_part(text)
    except BadInput:
        return
    assert str(part) == text and 1 <= part.number <= part.of


@pytest.mark.parametrize(
    ("kind", "of", "most"), [("layers", 4, 3), ("layers", 0, 3), ("rows", 6, 5), ("rows", -1, 5), ("columns", 1, 5), ("", 1, 5)]
)
def test_impossible_placements(kind: str, of: int, most: int) -> None:
    with pytest.raises(BadInput, match=f"can be spread over {most} at most"):
        parts(kind, of, groups_of([(9, 9), (5, 700), (6, 6)]))


def test_a_large_model_is_cut_quickly() -> None:
    """Both sides compute it for every group, whenever a session or a worker starts."""
    groups = groups_of([(16384, 8192), (8192, 8192), (57344, 8192), (8192, 28672)] * 80 + [(128256, 8192)])
    started = time.monotonic()
    for part in parts("layers", 8, groups):
        assert any(part.rows(index, groups) for index in range(len(groups)))
        assert sum(len(part.rows(index, groups)) for index in range(len(groups)))
    assert time.monotonic() - started < 5
