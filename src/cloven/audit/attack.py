"""What an attack found out, and the registry of attacks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def verdict_of(value: float, chance: float, tries: int) -> Verdict:
    """Broken from one half on; holds up to three standard deviations above chance, and one try."""
    if value >= 0.5:
        return "broken"
    return "holds" if value <= chance + 3 * (chance * (1 - chance) / tries) ** 0.5 + 1 / tries else "measured"
