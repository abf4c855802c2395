from __future__ import annotations

from cloven.audit.kv_shield.guesses import hits
from cloven.audit.kv_shield.sorting import by_sorting, sorting
from tests.audit.kv_shield.subjects import by_mode, mixed, permuted, rotated, subject, table, text


def test_sorting_undoes_permutations_and_no_rotations() -> None:
    rows = table()[text()]
    assert hits(by_sorting(permuted(rows), table()), text()) == 1
    assert hits(by_sorting(rotated(rows), table()), text()) < 0.4
    assert by_sorting(mixed(rows), table()).shape == text().shape  # wider rows


def test_permutations_do_not_withstand_it() -> None:
    found = by_mode(sorting(subject()), "sorting")
    assert all(found[mode].value == 1 and found[mode].verdict == "broken" for mode in ("none", "permute"))
    assert all(found[mode].value < 0.15 for mode in ("session", "sealed"))
