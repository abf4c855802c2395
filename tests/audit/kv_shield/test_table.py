from __future__ import annotations

from cloven.audit.kv_shield.guesses import hits
from cloven.audit.kv_shield.table import by_table
from cloven.audit.kv_shield.table import table as attack
from tests.audit.kv_shield.subjects import by_mode, permuted, subject, table, text


def test_table_reads_plain_rows_and_no_permuted_ones() -> None:
    rows = table()[text()]
    assert hits(by_table(rows + 0.01, table()), text()) == 1
    assert hits(by_table(permuted(rows), table()), text()) < 0.3


def test_any_key_is_enough() -> None:
    found = by_mode(attack(subject()), "table")
    assert found["none"].value == 1 and found["none"].verdict == "broken"
    assert all(found[mode].value < 0.4 and found[mode].verdict != "broken" for mode in ("permute", "session", "sealed"))
    assert all(one.chance == subject().chance and one.tries == len(subject().tokens) for one in found.values())
