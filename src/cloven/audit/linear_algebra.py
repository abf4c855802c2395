"""Linear algebra over F_p, for attackers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cloven.errors import RunError
from cloven.field.residues import P, centre


def solve_left(a: Tensor, h: Tensor) -> Tensor:
    """X with X A = H: residues A [k, k], H [N, k] -> int64 centred residues [N, k].

    Raises:
        RunError: A is singular.
    """
    k = a.shape[0]
    system = np.concatenate([a.t().numpy(), h.t().numpy()], axis=1).astype(np.int64) % P  # Aᵀ Xᵀ = Hᵀ
    for column in range(k):
        pivots = np.flatnonzero(system[column:, column])
        if not len(pivots):
            raise RunError("the matrix is singular")
        pivot = column + int(pivots[0])
        system[[column, pivot]] = system[[pivot, column]]
        system[column] = system[column] * pow(int(system[column, column]), -1, P) % P
        factors = system[:, column].copy()
        factors[column] = 0
        system[:, column:] = (system[:, column:] - factors[:, None] * system[column, column:] % P) % P
    return centre(torch.from_numpy(system[:, k:].T.copy())).long()
