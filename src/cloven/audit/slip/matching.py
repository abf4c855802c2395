"""Matching the rows or columns of two matrices whose order, and whose signs, are secret."""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.errors import BadInput

POINTS = 128  # of a profile
_ROUNDS = 12


def profiles(vectors: Tensor) -> Tensor:
    """What a vector keeps when its entries are permuted and flipped: sorted magnitudes over its norm, at 128 points; [n, m] -> [n, 128]."""
    ordered = vectors.float().abs().sort(1).values
    ordered = ordered / ordered.norm(dim=1, keepdim=True).clamp_min(1e-30) * vectors.shape[1] ** 0.5
    return torch.nn.functional.interpolate(ordered[:, None], POINTS, mode="linear", align_corners=True)[:, 0]


def cosines(vectors: Tensor) -> Tensor:
    """|cos| of every pair of vectors [n, m]: free of signs, and of the order of their entries; [n, n]."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    return (unit @ unit.t()).abs()


def assigned(likeness: Tensor) -> Tensor:
    """The one-to-one assignment with the largest sum: likeness [n, n] -> for each row its column, int64 [n].

    Raises:
        BadInput: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise BadInput("attacks on the scramble need SciPy: pip install 'cloven[audit]'") from error
    return torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])


def by_profiles(a: Tensor, b: Tensor) -> Tensor:
    """For every vector of a its partner among b, [n, ·] each, by magnitudes: int64 [n]."""
    return assigned(-torch.cdist(profiles(a), profiles(b)))


def by_graph(a: Tensor, b: Tensor) -> Tensor:
    """The same by the graphs of their cosines: quadratic assignment by Frank-Wolfe steps, from the profiles of the graphs' rows on."""
    first, second = (cosines(vectors).fill_diagonal_(0) for vectors in (a, b))
    match = by_profiles(first, second)
    value = float((first * second[match][:, match]).sum())
    for _ in range(_ROUNDS):
        following = assigned(first @ second[match])  # the gradient of the value
        reached = float((first * second[following][:, following]).sum())
        if reached <= value:
            break
        match, value = following, reached
    return match


def spread_evenly(vectors: Tensor, rounds: int = 30) -> Tensor:
    """Unit vectors in the one basis (up to a rotation) in which they point nowhere in particular: Tyler's estimator.

    The same for X and for D X M, whatever the row scales D and the basis M are: [n, h] -> [n, h].
    """
    x = vectors.double()
    whitening = torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(rounds):
        y = torch.nn.functional.normalize(x @ whitening, dim=1)
        values, basis = torch.linalg.eigh(y.t() @ y * (y.shape[1] / y.shape[0]))
        whitening = whitening @ basis @ torch.diag(values.clamp_min(1e-9).rsqrt()) @ basis.t()
    return torch.nn.functional.normalize(x @ whitening, dim=1).float()
