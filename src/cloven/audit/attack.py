"""What an attack found out, and the registry of attacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

_ENOUGH = 50  # tries
Verdict = Literal["holds", "measured", "broken"]


@dataclass(frozen=True)
class Attack:
    """One attack on one system.

    Args:
        name: of the attack.
        scheme: "kv-shield/session", say: the scheme and its mode.
        adversary: who attacks, and what that party has.
        metric: what `value` counts.
        value: what the attack reached.
        chance: what guessing reaches.
        weakened_value: what the same code reaches on a system without the protection.
        tries: how often it was tried; `value` is a fraction of them where it is one.
        verdict: "broken": the attack succeeds; "holds": it does no better than chance; "measured": between, or no claim is made.
        interval: of 95 % for `value`, where it is a share of independent tries.
        details: further numbers by name: perplexities, say.
    """

    name: str
    scheme: str
    adversary: str
    metric: str
    value: float
    chance: float
    weakened_value: float
    tries: int
    verdict: Verdict
    interval: tuple[float, float] | None = None
    details: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def verdict_of(value: float, chance: float, tries: int) -> Verdict:
    """Broken from half of the way from chance to all; holds up to three standard deviations above chance, and one try.

    No more than "measured" is said where guessing succeeds half of the time; nor "holds" above chance with fewer than 50 tries.
    """
    if chance >= 0.5:
        return "measured"
    if value - chance >= (1 - chance) / 2:
        return "broken"
    likely = chance + 3 * (chance * (1 - chance) / tries) ** 0.5 + 1 / tries
    return "holds" if value <= chance or (tries >= _ENOUGH and value <= likely) else "measured"


def controlled(attack: Attack) -> Attack:
    """The attack; but where it "holds" and its control does no better than chance, nothing follows, and it says so."""
    failed = (
        attack.weakened_value <= attack.chance or verdict_of(attack.weakened_value, attack.chance, max(attack.tries, _ENOUGH)) == "holds"
    )
    if attack.verdict != "holds" or not failed:
        return attack
    return replace(attack, verdict="measured", metric=f"{attack.metric}; its control did no better than chance: no conclusion")


def interval_of(value: float, tries: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share of `tries`."""
    z = 1.96
    middle, spread = value + z * z / (2 * tries), z * math.sqrt(value * (1 - value) / tries + z * z / (4 * tries * tries))
    return max(0.0, (middle - spread) / (1 + z * z / tries)), min(1.0, (middle + spread) / (1 + z * z / tries))
