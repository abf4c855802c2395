"""What a bundle shows of the secret's subspaces; the statistics are in tests/attacks/test_null_space.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cloven.audit.attack import controlled
from cloven.audit.slip.null_space import View, null_space
from cloven.slip.exposed_matrix import expose
from tests.audit.slip.subjects import based_subject, demo_subject, named, tiny_subject


@pytest.mark.parametrize(
    ("precision", "scramble"),
    [
        pytest.param(precision, scramble, marks=() if (precision, scramble) == ("int8", "mixing") else pytest.mark.long)
        for precision in ("int8", "int8x2")
        for scramble in ("mixing", "permutation", "none")
    ],
)
def test_the_decoy_hides_the_hole(precision: str, scramble: str) -> None:
    """(Each is attacked with the other precision as well.)"""
    found = named(null_space(demo_subject(precision, scramble)))
    other = "_int8x2" if precision == "int8" else "_int8"
    names = {f"null_space_{name}{kind}" for name in ("bottom", "top", "closest_pairs", "peaked") for kind in ("", other)}
    for kind in ("_scrambled", f"{other}_scrambled") if scramble != "none" else ():
        names |= {f"null_space_{name}{kind}" for name in ("bottom", "top", *(["peaked"] if scramble == "permutation" else []))}
    assert set(found) == names
    assert all(attack.scheme.endswith("another split") is (other in name) for name, attack in found.items())
    assert all(controlled(attack).verdict == attack.verdict for attack in found.values())  # every control succeeds
    for attack in found.values():
        assert attack.value < attack.chance + 0.2 and attack.tries > 50
        assert attack.value in attack.details.values()
    for kind in ("", other):
        bottom = found[f"null_space_bottom{kind}"]
        assert bottom.weakened_value > 0.7 > 10 * bottom.chance
    if scramble != "none":
        bottom = found["null_space_bottom_scrambled"]
        assert bottom.weakened_value > 0.2 > 3 * bottom.chance  # a group's members share columns: one's hole is another's content


def test_secret_directions_are_where_the_codes_have_them() -> None:
    """The truth of the scrambled case: with nothing taken out, a matrix's own top directions are its secret ones."""
    group = tiny_subject().groups[0]
    whole = expose(torch.cat([group.weight(part) for part in range(len(group.parts))]), group.terms, None)
    view, scrambled = View.as_it_lies(whole, group), View.as_it_lies(group.matrix, group)
    assert view.secret[0].shape == scrambled.secret[0].shape and view.k == sum(m.secret_a.shape[0] for m, _ in group.parts)
    codes = whole.codes.double()
    aligned = torch.linalg.norm(codes @ view.secret[1]) / torch.linalg.norm(codes)
    assert float(aligned) > (view.k / codes.shape[1]) ** 0.5


def test_the_base_shows_the_directions_of_a_difference() -> None:
    """Stated in the threat model: --public-base has no decoy."""
    attack = named(null_space(based_subject()))["null_space_against_the_base"]
    assert attack.value > 0.9 and attack.weakened_value > 0.9 and attack.verdict == "broken"
    assert null_space(replace(based_subject(), relative=None)) == []


def test_without_a_secret_part_there_is_nothing_to_find() -> None:
    subject = tiny_subject()
    assert null_space(replace(subject, groups=())) == []
