"""What an audit found: attacks, figures, parameters, and what was not tested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cloven.audit.attack import Attack
from cloven.audit.figure import Figure
from cloven.errors import RunError

VERSION = 1  # of the JSON


@dataclass(frozen=True)
class Findings:
    """The outcome of an audit.

    Args:
        scheme: "slip", "kv-shield" or "private-lora".
        attacks, figures: see there.
        parameters: of the bundle, and of the audit: what makes it reproducible.
        not_tested: in sentences.
        failed: why attacks ended early; in `not_tested` too.
    """

    scheme: str
    attacks: list[Attack]
    figures: list[Figure] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    not_tested: tuple[str, ...] = ()
    failed: tuple[RunError, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "version": VERSION,
            "scheme": self.scheme,
            "attacks": [attack.to_dict() for attack in self.attacks],
            "figures": [figure.to_dict() for figure in self.figures],
            "parameters": self.parameters,
            "not_tested": list(self.not_tested),
        }
