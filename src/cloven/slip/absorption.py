"""The alternation of SVD and quantisation: the secret factor takes over what it can of the quantisation error.

    W ≈ Ê + B A        Ê the codes as the trusted process reads them, A [k, K] fixed
    B' = B + Δ D Aᵀ (A D Aᵀ)^-1,    Δ = E − Ê,  D = diag(mean square of x), or I

is the B that minimises E‖(W − Ê − B A) x‖² for inputs with these mean squares. It costs nothing at run time, and the exposed half stays as
it was, decoy included: only the trusted factor changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.slip.decomposition import Split
from cloven.slip.exposed_matrix import ExposedMatrix, rows_at_a_time


def absorb(parts: list[Split], stacked: Tensor, matrix: ExposedMatrix, activations: Tensor | None) -> tuple[list[Split], float, float]:
    """Correct the secret factors of a group.

    Args:
        parts: the members' splits, in the order of their rows in `stacked`; none is changed.
        stacked: E [N, K], before quantisation.
        activations: root mean squares of x [K]; None: all alike.

    Returns:
        The corrected splits; squared Frobenius norms of what is left of the error, and of E.
    """
    corrected, start = [], 0
    read = matrix.dequantised(stacked.dtype)
    error = energy = 0.0
    for part in parts:
        rows = part.exposed.shape[0]
        weights = torch.ones(stacked.shape[1], dtype=torch.float64) if activations is None else activations.square()
        secret_b, solve = part.secret_b.to(torch.float64).clone(), _projection(part.secret_a, weights)
        step = rows_at_a_time(stacked.shape[1])
        for first in range(0, rows, step):
            last = min(first + step, rows)
            some = stacked[start + first : start + last].to(torch.float64)
            left = some - read[start + first : start + last]
            energy += float(some.square().sum())
            if solve is not None:
                change = left @ solve
                secret_b[first:last] += change
                left = left.addmm_(change, part.secret_a.to(torch.float64), alpha=-1)
            error += float(left.square().sum())
        corrected.append(Split(part.exposed, part.secret_a, secret_b))
        start += rows
    return corrected, error, energy


def _projection(secret_a: Tensor, weights: Tensor) -> Tensor | None:
    """D Aᵀ (A D Aᵀ)^-1 [K, k]; None where there is nothing to correct."""
    if not secret_a.shape[0]:
        return None
    a = secret_a.to(torch.float64)
    weighted = a * weights
    solution: Tensor = torch.linalg.lstsq(weighted @ a.t(), weighted).solution
    return solution.t()
