"""Chi-square test of bytes against the uniform distribution."""

from __future__ import annotations

from torch import Tensor

from cloven.audit.slip.transcripts import uniform_p


def chi_square_of_low_bytes(values: Tensor) -> float:
    """The p-value of a chi-square test with 255 degrees of freedom: values 0 … 255, any integer dtype, [n]."""
    return uniform_p(values, 256)
