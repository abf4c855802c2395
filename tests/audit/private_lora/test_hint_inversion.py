from __future__ import annotations

from dataclasses import replace

import pytest

from cloven.audit.private_lora.hint_inversion import hint_inversion
from cloven.field.products import multiply
from cloven.field.selection import select_backend
from cloven.masks.public_matrix import a_pub
from tests.audit.private_lora.targets import COLUMNS, target


@pytest.mark.parametrize(("columns", "hint"), [(COLUMNS, "lwe"), (COLUMNS, "statistical"), (600, "lwe")])  # 600: the attack knows 88
def test_the_hint_cannot_be_inverted(columns: int, hint: str) -> None:
    (attack,) = hint_inversion(target(2, columns, hint=hint))
    assert attack.value < 0.02 and attack.verdict == "holds" and attack.weakened_value == 1.0
    assert attack.tries == 2 * min(columns, 512)


def test_a_hint_without_a_pad_is_inverted() -> None:
    one = target(2, COLUMNS)
    bare = a_pub(1280 + COLUMNS)[1280:].t().contiguous()
    hint = multiply(select_backend("cpu"), bare, select_backend("cpu").place(one.codes.contiguous())).t().contiguous()
    (attack,) = hint_inversion(replace(one, hint=hint))
    assert attack.value == 1.0 and attack.verdict == "broken"
