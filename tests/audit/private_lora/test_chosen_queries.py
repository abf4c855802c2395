from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloven.audit.private_lora.chosen_queries import nearest, within_budget
from cloven.field.residues import H, P
from tests.audit.private_lora.targets import COLUMNS, target

RESIDUES = st.integers(-H, H)


def distance(a: int, b: int) -> int:
    return min((a - b) % P, (b - a) % P)


@given(st.lists(RESIDUES, min_size=1, max_size=12), st.lists(RESIDUES, min_size=1, max_size=12, unique=True))
def test_nearest_is_the_nearest(z: list[int], table: list[int]) -> None:
    found = nearest(torch.tensor([z], dtype=torch.int32), torch.tensor(table, dtype=torch.int32))
    assert found.shape == (1, len(z))
    for value, index in zip(z, found[0].tolist(), strict=True):
        assert distance(value, table[index]) == min(distance(value, entry) for entry in table)


@given(st.lists(RESIDUES, min_size=1, max_size=12, unique=True))
def test_entries_of_the_table_are_found_themselves(table: list[int]) -> None:
    entries = torch.tensor(table, dtype=torch.int32)
    assert torch.equal(nearest(entries.view(-1, 1), entries), torch.arange(len(table)).view(-1, 1))


def test_nearest_goes_around_the_circle() -> None:
    near: Callable[[int], int] = lambda z: int(nearest(torch.tensor([[z]], dtype=torch.int32), table))  # noqa: E731
    table = torch.tensor([H - 5, 0, -H + 100], dtype=torch.int32)
    assert (near(H), near(-H), near(-H + 40), near(-H + 60), near(3)) == (0, 0, 0, 2, 1)


@pytest.mark.parametrize(("budget", "value", "verdict"), [(6, 0.125, "measured"), (24, 0.5, "broken"), (10**6, 1.0, "broken")])
def test_what_a_budget_gives_goes_on_like_what_was_shown(budget: int, value: float, verdict: str) -> None:
    attack = within_budget(target(budget=budget), "name", "what", 1.0, 4, 4)
    assert (attack.value, attack.verdict, attack.weakened_value, attack.tries) == (value, verdict, 1.0, 4)
    assert attack.chance == min(1.0, 2 * budget / COLUMNS) and f"{budget:,} answers (what)" in attack.metric
