"""The parameters of a private-LoRA bundle."""

from __future__ import annotations

from dataclasses import dataclass

from cloven.errors import BadInput
from cloven.masks.lwe_parameters import LweParameters, lwe_parameters

TERMS = 2  # int8 terms per weight
FEWEST_BITS, MOST_BITS = 8, 16
MOST_TOKENS = 2**40


@dataclass(frozen=True)
class PrivateLoraConfig:
    """How an adapter is served, and how much of it may be given away.

    Args:
        budget_tokens: rows that may be asked of every group of linears, by all clients together; no default: it decides how much of the
            adapter the answers reveal (see `revealed_share`).
        client_tokens: rows that one client may ask; None: the whole budget.
        bits: b, of an answer: 8 to 16.
        hint: "lwe" or "statistical"; see `LweParameters`.
    """

    budget_tokens: int
    client_tokens: int | None = None
    bits: int = 16
    hint: str = "lwe"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not FEWEST_BITS <= self.bits <= MOST_BITS:
            raise BadInput(f"bits {self.bits}: choose {FEWEST_BITS} to {MOST_BITS}")
        for name, value in (("budget-tokens", self.budget_tokens), ("client-tokens", self.client_share)):
            if type(value) is not int or not 1 <= value <= MOST_TOKENS:
                raise BadInput(f"{name} {value}: give at least 1 token")
        if self.client_share > self.budget_tokens:
            raise BadInput(f"client-tokens {self.client_share}: more than the budget of all clients, {self.budget_tokens}")
        lwe_parameters(self.hint)

    @property
    def client_share(self) -> int:
        """Rows that one client may ask."""
        return self.budget_tokens if self.client_tokens is None else self.client_tokens

    @property
    def parameters(self) -> LweParameters:
        """Of the encryption."""
        return lwe_parameters(self.hint)


def revealed_share(tokens: int, columns: int, bits: int, entropy: float) -> float:
    """How much of a matrix with `columns` columns `tokens` answers of `bits` bits give away at most: 1 means all of it.

    Q answers reveal Q·b bits of every row, which has about d·h of them: `entropy` is h, of the row that has fewest. An attacker who knows
    more of the weights than how often each value occurs needs fewer answers.
    """
    return min(1.0, tokens * bits / (max(entropy, 0.1) * columns))
