"""Parameters of the SLIP split."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cloven.errors import BadInput

ORIGINS = ("private", "public-base", "adapter")
INSECURE_SCRAMBLE = (
    "INSECURE: scramble {}: whoever holds the exposed half reads it as it is, or with a little knowledge. "
    "`cloven audit` shows what that is worth."
)
SCRAMBLES = {"mixing": 3, "permutation": 0, "none": 0}  # rounds of mixing
PRECISIONS = {"int8": 1, "int8x2": 2}  # number of int8 terms of the exposed matrices


@dataclass(frozen=True)
class SlipConfig:
    """What `prepare_slip` does.

    Args:
        secret_fraction: share of the split matrices' parameters that the trusted process keeps, spent greedily over all layers on
            the singular values that carry most energy; 0 keeps the weights public and only the activations secret.
        rank: keep this many singular values of every matrix instead.
        precision: "int8", or "int8x2" with a second int8 term for the remainder (near-lossless, twice the worker's work).
        scramble: what is done to the rows and columns of every group's exposed matrix, with secret keys:
            "mixing"       mixed by Hadamard transforms between secret permutations with signs and sizes, in three rounds;
            "permutation"  permuted and flipped only: a little faster, and broken by a few known columns (see the audit);
            "none"         nothing.
            The last two are INSECURE for a private model of which anything is secret: `prepare_slip` then prints a banner.
        origin: where the model comes from, and so what is secret in it:
            "private"      no public relative is known: the top singular part of every matrix is secret, with a decoy in its place;
            "public-base"  a fine-tune of a public model: the top singular part of the difference is secret, the rest of it is exposed;
            "adapter"      a LoRA on a public model: exactly the adapter is secret, and the exposed half is a function of the base alone.
            The last two leave out scramble and decoy, which a public relative would undo, and take all scales from the base.
    """

    secret_fraction: float = 0.03
    rank: int | None = None
    precision: str = "int8"
    scramble: str = "mixing"
    origin: str = "private"

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS:
            raise BadInput(f"origin {self.origin!r}: choose one of {', '.join(ORIGINS)}")
        if self.scramble not in SCRAMBLES:
            raise BadInput(f"scramble {self.scramble!r}: choose one of {', '.join(SCRAMBLES)}")
        if self.origin != "private" and self.scramble != "none":
            raise BadInput("scramble: a public relative undoes it, and the exposed half would depend on secret keys: leave it out")
        if self.origin == "adapter" and self.rank is not None:
            raise BadInput("rank: the secret part is exactly the adapter; it has the adapter's rank")
        if not 0 <= self.secret_fraction <= 0.5:
            raise BadInput(f"secret fraction {self.secret_fraction}: give a share from 0 to 0.5; 0.03 is 3 % of the parameters")
        if self.rank is not None and self.rank < 0:
            raise BadInput(f"rank {self.rank}: give 0 or more")
        if self.precision not in PRECISIONS:
            raise BadInput(f"precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")

    @property
    def insecure(self) -> bool:
        """Whether a private model's exposed half would be hidden less well than it can be."""
        return self.origin == "private" and self.scramble != "mixing" and (self.rank or self.secret_fraction) > 0

    @property
    def terms(self) -> int:
        """Number of int8 terms."""
        return PRECISIONS[self.precision]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
