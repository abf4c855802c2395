from __future__ import annotations

import json

import pytest

from cloven.audit.attack import Attack, verdict_of


@pytest.mark.parametrize(
    ("value", "chance", "tries", "verdict"),
    [
        (1.0, 0.01, 100, "broken"),
        (0.5, 0.01, 100, "broken"),
        (0.5, 0.5, 100, "broken"),  # no claim is made where guessing succeeds
        (0.49, 0.01, 100, "measured"),
        (0.01, 0.01, 100, "holds"),
        (0.0, 0.01, 100, "holds"),
        (0.0, 0.0, 100, "holds"),
        (0.01, 0.0, 100, "holds"),  # one try
        (0.02, 0.0, 100, "measured"),
        (0.1 + 0.09 + 0.01, 0.1, 100, "holds"),  # three standard deviations of 3 %, and one try
        (0.1 + 0.09 + 0.011, 0.1, 100, "measured"),
        (0.12, 0.1, 10_000, "measured"),  # more tries, less chance
        (0.3, 0.1, 10, "holds"),
    ],
)
def test_verdicts(value: float, chance: float, tries: int, verdict: str) -> None:
    assert verdict_of(value, chance, tries) == verdict


def test_a_record_as_json() -> None:
    attack = Attack("sorting", "kv-shield/session", "a thief", "tokens", 0.25, 0.1, 1.0, 16, "measured")
    record = json.loads(json.dumps(attack.to_dict()))
    assert Attack(**record) == attack
    assert list(record) == ["name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict"]
