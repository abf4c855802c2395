"""Fixed-point codec with a no-wrap guarantee (ours).

For a row x [K] and integer matrices with rows W_j, over all rows of all matrices of a group,

    α     = (1 − 2^-20)·(H − ½·max_j‖W_j‖₁ − noise) / (max(1, max_j‖W_j‖₂)·‖x‖₂)
    x_int = round(α·x)

By Cauchy–Schwarz |W_j·x_int| ≤ α‖W_j‖₂‖x‖₂ + ½‖W_j‖₁ ≤ H − noise, so W_j·x_int is never reduced modulo p, however strong the
outliers, and the entries of x_int are residues themselves. All in float64: in float32 the bound fails (x_int = 2^30 for
W = [1], x = 1). α stays with the holder of x, so it may follow the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cloven.errors import BadInput, RunError
from cloven.field.native.library import kernels_in_use
from cloven.field.residues import H

ZERO_NORM = 2.0**-100  # shorter rows have α = 1 and so round to zeros (and are masked like any other)
_SLACK = 1 - 2.0**-20
NOT_FINITE = "the activations hold NaN or infinity: nothing was sent"


@dataclass(frozen=True)
class RowBounds:
    """Upper bounds over all rows of a group's integer matrices: `l1` = max ‖W_j‖₁, `l2` = max ‖W_j‖₂."""

    l1: int
    l2: float

    def __post_init__(self) -> None:
        if not (0 <= self.l1 < H and 0 <= self.l2 <= self.l1 and math.isfinite(self.l2)):
            raise BadInput(f"row bounds l1={self.l1}, l2={self.l2} do not belong to an int8 matrix")


def row_bounds(codes: Tensor) -> RowBounds:
    """The bounds of an int8 matrix [N, K]; l2 is rounded up."""
    l1 = l2 = 0
    for rows in codes.split(1024):
        wide = rows.to(torch.int64).abs()
        l1 = max(l1, int(wide.sum(1).max()))
        l2 = max(l2, int(wide.square_().sum(1).max()))
    return RowBounds(l1, min(float(l1), math.nextafter(math.sqrt(l2), math.inf)))  # ‖·‖₂ ≤ ‖·‖₁ whatever the rounding


def encode(x: Tensor, bounds: RowBounds, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Encode rows in fixed point such that no product with the bounded matrices wraps.

    Args:
        x: float64 [M, K].
        bounds: bounds of the matrices that x will meet.
        noise: bound on what will be added to the product, in units of the field.

    Returns:
        x_int: int32 [M, K], residues; alpha: float64 [M, 1], the scale (1 for rows encoded as zeros).

    Raises:
        RunError: x holds NaN or infinity, or is longer than 10^150. Raised before a pad is taken.
    """
    kernels, scale = kernels_in_use(), scale_of(bounds, noise)
    encoded = kernels.encode(x, scale) if kernels is not None else encode_in_numpy(x, scale)
    if encoded is None:
        raise RunError(NOT_FINITE)
    return encoded


def scale_of(bounds: RowBounds, noise: float = 0.0) -> float:
    """α‖x‖: see the module.

    Raises:
        BadInput: no room is left in the field.
    """
    room = _SLACK * (H - 0.5 * bounds.l1 - noise)
    if room <= 0:
        raise BadInput(f"row bounds leave no room in the field: l1={bounds.l1}, noise={noise}")
    return room / max(1.0, bounds.l2)


def encode_in_numpy(x: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """The same without the kernel, and its oracle; None where a row is not finite.

    ‖x‖² is summed in eight lanes, in order, and these pairwise: in that order the kernel sums, too.
    """
    rows = x.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))
        lanes = np.zeros((len(rows), 8))
        for step in range(0, padded.shape[1], 8):
            lanes += padded[:, step : step + 8] * padded[:, step : step + 8]
        a, b, c, d = (lanes[:, i] + lanes[:, i + 1] for i in (0, 2, 4, 6))
        norms = np.sqrt((a + b) + (c + d))
    if not np.isfinite(norms).all():
        return None
    alpha = np.where(norms < ZERO_NORM, 1.0, scale / np.maximum(norms, ZERO_NORM))[:, None]
    return torch.from_numpy(np.rint(rows * alpha).astype(np.int32)), torch.from_numpy(alpha)


def decode(y_int: Tensor, alpha: Tensor) -> Tensor:
    """Undo `encode` after the product: int [M, N] and alpha [M, 1] -> float64 [M, N]."""
    kernels = kernels_in_use()
    if kernels is not None and y_int.dtype == torch.int32:
        return kernels.decode(y_int, alpha)
    return torch.from_numpy(y_int.numpy() / alpha.numpy())
