"""What a bundle shows of the secret's subspaces; the statistics are in tests/attacks/test_null_space.py."""

from __future__ import annotations

import pytest

from cloven.audit.slip.null_space import null_space
from tests.audit.slip.subjects import demo_subject, named, tiny_subject


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("scramble", [True, False])
def test_the_decoy_hides_the_hole(precision: str, scramble: bool) -> None:
    found = named(null_space(demo_subject(precision, scramble)))
    assert set(found) == {f"null_space_{name}" for name in ("bottom", "top", "closest_pairs", "peaked")}
    for attack in found.values():
        assert attack.value < attack.chance + 0.2 and attack.tries > 50
    bottom = found["null_space_bottom"]
    assert bottom.weakened_value > 0.7 > 10 * bottom.chance


def test_without_a_secret_part_there_is_nothing_to_find() -> None:
    from dataclasses import replace

    subject = tiny_subject()
    assert null_space(replace(subject, groups=())) == []
