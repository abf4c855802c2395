from __future__ import annotations

from cloven.audit.kv_shield.guesses import hits
from cloven.audit.kv_shield.norms import by_norms, norms
from tests.audit.kv_shield.subjects import by_mode, mixed, rotated, subject, table, text


def test_norms_undo_rotations_and_no_invertible_matrices() -> None:
    rows = table()[text()]
    assert hits(by_norms(rotated(rows), table()), text()) >= 0.95
    assert hits(by_norms(mixed(rows), table()), text()) < 0.3


def test_permutations_do_not_withstand_it() -> None:
    found = by_mode(norms(subject()), "norms")
    assert all(found[mode].value >= 0.95 and found[mode].verdict == "broken" for mode in ("none", "permute"))
    assert all(found[mode].value < 0.15 for mode in ("session", "sealed"))
