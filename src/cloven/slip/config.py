"""Parameters of the SLIP split."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cloven.errors import BadInput

PRECISIONS = {"int8": 1, "int8x2": 2}  # number of int8 terms of the exposed matrices


@dataclass(frozen=True)
class SlipConfig:
    """What `prepare_slip` does.

    Args:
        secret_fraction: share of the split matrices' parameters that the trusted process keeps, spent greedily over all layers on
            the singular values that carry most energy; 0 keeps the weights public and only the activations secret.
        rank: keep this many singular values of every matrix instead.
        precision: "int8", or "int8x2" with a second int8 term for the remainder (near-lossless, twice the worker's work).
        scramble: permute and sign-flip the rows and columns of every group's exposed matrix with secret keys.
    """

    secret_fraction: float = 0.03
    rank: int | None = None
    precision: str = "int8"
    scramble: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.secret_fraction <= 0.5:
            raise BadInput(f"secret fraction {self.secret_fraction}: give a share from 0 to 0.5; 0.03 is 3 % of the parameters")
        if self.rank is not None and self.rank < 0:
            raise BadInput(f"rank {self.rank}: give 0 or more")
        if self.precision not in PRECISIONS:
            raise BadInput(f"precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")

    @property
    def terms(self) -> int:
        """Number of int8 terms."""
        return PRECISIONS[self.precision]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
