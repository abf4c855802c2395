from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cloven.audit.slip import known_columns as module
from cloven.audit.slip.known_columns import known_columns, share_from_known
from cloven.audit.slip.unscrambling import columns_side, planted
from tests.audit.slip.subjects import demo_subject, named, tiny_subject


def test_a_few_columns_give_permutations_away_and_little_of_mixings() -> None:
    """The reason for the second scramble: measured, not hidden."""
    subject = demo_subject()
    found = known_columns(replace(subject, groups=subject.groups[8:16]))
    mixed, permuted = named(found, "mixing"), named(found, "permutation")
    assert set(mixed) == set(permuted) == {f"unscramble_from_{count}_known" for count in (4, 16, 64)}
    assert permuted["unscramble_from_64_known"].verdict == permuted["unscramble_from_16_known"].verdict == "broken"
    assert mixed["unscramble_from_4_known"].verdict == mixed["unscramble_from_16_known"].verdict == "holds"
    assert mixed["unscramble_from_64_known"].details["highest_of_one_pair"] < 0.2
    assert mixed["unscramble_from_16_known"].adversary == "A1, who knows 16 of 256 columns"
    for attack in found:
        assert attack.weakened_value > (0.95 if attack.name != "unscramble_from_4_known" else 0.5), attack


@pytest.mark.parametrize("mixed", [False, True])
def test_a_copy_is_found_from_a_few(mixed: bool) -> None:
    matrix = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 3, 64)
    first, near = (columns_side(seen) for seen in planted(matrix, 1, mixed=mixed))
    assert share_from_known(first, near, torch.arange(8)) > 0.9
    stranger = columns_side(planted(torch.randn(300, 64, generator=torch.Generator().manual_seed(2)), 1, mixed=mixed)[0])
    assert share_from_known(first, stranger, torch.arange(8)) < 0.15


def test_where_it_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_columns(demo_subject(scramble="none")) == []
    monkeypatch.setattr(module, "MOST_COLUMNS", 16)
    assert known_columns(tiny_subject()) == []
