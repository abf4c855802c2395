"""Chi-square test of bytes against the uniform distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def chi_square_of_low_bytes(values: Tensor) -> float:
    """The p-value of a chi-square test with 255 degrees of freedom: values 0 … 255, any integer dtype, [n]."""
    counts = torch.bincount(values.long(), minlength=256).double()
    expected = counts.sum() / 256
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(255 / 2, dtype=torch.float64), statistic / 2))
