"""The parameters of private LoRA's encryption: learning with errors over F_p, preprocessed.

    query   c = A_pub s + e + x_int           s ∈ χ^n, e ∈ χ^D, χ the discrete Gaussian with σ = 6.4; x_int zero on the pad columns
    hint    H = W' A_pub + E_h                W' = [R | W],  R ∈ χ_16^{N × 1280},  E_h ∈ χ_16^{N × n}
    answer  z = W' c                          z − H s = W x_int + W' e − E_h s

Hardness of a query, (n, σ, p) = (1280, 6.4, 2^31 − 1): 159.8 bits (MATZOV), 135.2 (core-SVP), 122.7 (quantum core-SVP); of the hint's mask:
179.4 and 157.2 bits. Estimated with malb/lattice-estimator of June 2026; heuristic cost models, no proofs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cloven.errors import BadInput
from cloven.field.residues import P

Hint = Literal["lwe", "statistical"]
SPECIFICATION = 1  # of A_pub, the distributions and this arithmetic: another number is another scheme


@dataclass(frozen=True)
class LweParameters:
    """One set of parameters; there are two, which differ in what masks the hint.

    Security: a query 159.8 bits (MATZOV), 135.2 (core-SVP), 122.7 (quantum core-SVP); the default hint 179.4 and 157.2
    (malb/lattice-estimator of June 2026).

    Args:
        hint: "lwe": R Gaussian on 1280 columns and a Gaussian E_h: the hint is an LWE sample with secret R, whatever W is.
            "statistical": R uniform in [−127, 127] on N = 5056 columns, E_h = 0. By the leftover hash lemma the hint is within
            r/2·√(p^n / 255^N) of uniform, r the number of rows that ever used A_pub: 2^-128 for r = 2^20 rows. Unconditional, at 1.7 times
            the upload. (For one fixed A_pub, Markov's inequality: at most 2^-88 for all but 2^-40 of the A_pub.)
        n: length of the secret.
        sigma: σ of s and e, a decimal number.
        sigma_hint: σ of R and E_h ("lwe").
        pad_columns: columns of R.
    """

    hint: Hint
    n: int = 1280
    sigma: str = "6.4"
    sigma_hint: str = "16"
    pad_columns: int = 1280

    @property
    def pad_norm(self) -> float:
        """Upper bound on ‖R_j‖₂; `prepare` draws again where it does not hold (probability < 2^-40)."""
        deviation = float(self.sigma_hint) if self.hint == "lwe" else math.sqrt((255**2 - 1) / 12)
        return 1.2 * deviation * math.sqrt(self.pad_columns)

    def noise(self, l2: float, bits: int) -> float:
        """Bound on |answer − W x_int|: 8 standard deviations of W' e − E_h s, and the rounding. A wrap then has probability < 2^-45.

        Args:
            l2: upper bound on ‖W_j‖₂.
            bits: of an answer.
        """
        sigma, hint_error = float(self.sigma), float(self.sigma_hint) if self.hint == "lwe" else 0.0
        variance = sigma**2 * (l2**2 + self.pad_norm**2) + self.n * (hint_error * sigma) ** 2
        return 8 * math.sqrt(variance) + 2.0 ** (31 - bits)

    def hint_distance_log2(self, rows: int) -> float:
        """log2 of the leftover-hash bound r/2·√(p^n / 255^N) on the distance of the hints of r rows from uniform ("statistical")."""
        return math.log2(rows) - 1 + 0.5 * (self.n * math.log2(P) - self.pad_columns * math.log2(255))


_SETS = {"lwe": LweParameters("lwe"), "statistical": LweParameters("statistical", pad_columns=5056)}


def lwe_parameters(hint: str) -> LweParameters:
    """The parameters with that hint.

    Raises:
        BadInput: there are none.
    """
    if hint not in _SETS:
        raise BadInput(f"hint {hint!r}: choose lwe or statistical")
    return _SETS[hint]
