"""A secret orthogonal mixing of coordinates in n·log n steps.

    R = S_2 H S_1 H        H: Hadamard transforms of blocks (public, `cloven.field.hadamard`); S_i: secret signed permutations

Every entry of R x depends on up to 256² entries of x. Guarantee: none is proved. Unlike a permutation alone, R leaves no entries,
norms or sparse patterns of single coordinates in place by which they could be found one after the other; inner products, and so
spectra, stay. The audit measures what that gives away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cloven.field.hadamard import Rows, transform_, turn
from cloven.field.prg import SecretStream

ROUNDS = 2
_ENTRIES = 2**15  # of float64, at a time


@dataclass(frozen=True)
class Mixing:
    """R for vectors of n entries.

    Args:
        gather: places, int32 [rounds, n]: after round i entry j is what was at gather[i, j].
        scale: signs (and, in a last round, units), float32 [rounds, n].
    """

    gather: Tensor
    scale: Tensor

    def __repr__(self) -> str:
        return f"Mixing({tuple(self.gather.shape)}, <secret>)"

    @classmethod
    def fresh(cls, n: int, stream: SecretStream) -> Mixing:
        """Of a secret stream."""
        rounds = [(stream.permutation(n).to(torch.int32), stream.signs(n).to(torch.float32)) for _ in range(ROUNDS)]
        return cls(torch.stack([gather for gather, _ in rounds]), torch.stack([signs for _, signs in rounds]))

    @classmethod
    def none(cls, n: int) -> Mixing:
        """R = I, without a round."""
        return cls(torch.empty(0, n, dtype=torch.int32), torch.empty(0, n))

    def scaled(self, units: Tensor) -> Mixing:
        """diag(units) R."""
        return Mixing(self.gather, torch.cat([self.scale[:-1], (self.scale[-1] * units).to(torch.float32)[None]]))

    def apply(self, x: Rows) -> Rows:
        """R x of every row: float64 [M, n] -> float64 [M, n]; x itself where there is no round."""
        return turn(x, self.gather.numpy(), self.scale.numpy(), leading=True) if len(self.gather) else x

    def transposed(self, x: Rows) -> Rows:
        """Rᵀ x of every row, and so R⁻¹ x where all scales are signs: float64 [M, n] -> float64 [M, n]."""
        rounds = [
            (np.argsort(gather), scale) for gather, scale in zip(self.gather.numpy(), self.scale.numpy().astype(np.float64), strict=True)
        ]
        result, step = np.empty_like(x), max(1, _ENTRIES // x.shape[1])
        for first in range(0, len(x), step):  # in the cache
            part = x[first : first + step]
            for back, scale in reversed(rounds):
                part = (part * scale).take(back, axis=1)
                transform_(part, transposed=True)
            result[first : first + step] = part
        return result
