from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cloven.audit.attack import Attack, controlled, interval_of, verdict_of


@pytest.mark.parametrize(
    ("value", "chance", "tries", "verdict"),
    [
        (1.0, 0.01, 100, "broken"),
        (0.505, 0.01, 100, "broken"),
        (0.5, 0.5, 100, "measured"),  # no claim is made where guessing succeeds
        (0.58, 0.578, 64, "measured"),
        (0.54, 0.1, 100, "measured"),  # not yet half of the way from chance to all
        (0.55, 0.1, 100, "broken"),
        (0.49, 0.01, 100, "measured"),
        (0.01, 0.01, 100, "holds"),
        (0.0, 0.01, 100, "holds"),
        (0.0, 0.0, 100, "holds"),
        (0.01, 0.0, 100, "holds"),  # one try
        (0.02, 0.0, 100, "measured"),
        (0.1 + 0.09 + 0.01, 0.1, 100, "holds"),  # three standard deviations of 3 %, and one try
        (0.1 + 0.09 + 0.011, 0.1, 100, "measured"),
        (0.12, 0.1, 10_000, "measured"),  # more tries, less chance
        (0.3, 0.1, 10, "measured"),  # too few to tell
        (0.1, 0.1, 10, "holds"),
    ],
)
def test_verdicts(value: float, chance: float, tries: int, verdict: str) -> None:
    assert verdict_of(value, chance, tries) == verdict


def test_nothing_holds_whose_control_failed() -> None:
    good = Attack("a", "s", "A1", "share", 0.01, 0.01, 0.9, 100, "holds")
    assert controlled(good) == good and controlled(replace(good, verdict="broken", weakened_value=0.0)).verdict == "broken"
    failed = controlled(replace(good, weakened_value=0.0))
    assert failed.verdict == "measured" and failed.metric == "share; its control did no better than chance: no conclusion"


def test_a_record_as_json() -> None:
    attack = Attack("sorting", "kv-shield/session", "a thief", "tokens", 0.25, 0.1, 1.0, 16, "measured")
    record = json.loads(json.dumps(attack.to_dict()))
    assert Attack(**record) == attack
    keys = ["name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict", "interval", "details"]
    assert list(record) == keys
    assert json.loads(json.dumps(Attack("a", "b", "c", "d", 0.25, 0.1, 1.0, 16, "measured", (0.1, 0.4), {"perplexity": 2.0}).to_dict()))[
        "details"
    ] == {"perplexity": 2.0}


def test_an_interval_holds_the_share() -> None:
    low, high = interval_of(0.1, 100)
    assert (round(low, 3), round(high, 3)) == (0.055, 0.174)  # Wilson's, from a table
    assert interval_of(0.0, 10)[0] == 0.0 and interval_of(1.0, 10)[1] == pytest.approx(1.0) and interval_of(1.0, 10)[0] < 0.8
