"""A secret mixing of coordinates in n·log n steps.

    R = S_3 H S_2 H S_1 H        H: Hadamard transforms of blocks (public, `cloven.field.hadamard`)
                                 S_i: secret signed permutations; one of them with secret sizes, e^u, u uniform in ±½, for its signs

What is exposed is mixed by R⁻¹: a matrix's rows by R⁻¹ from the left, its columns by R⁻¹ from the right. Guarantee: none is proved.
Unlike a permutation alone, R leaves no entries, norms or sparse patterns of single coordinates in place by which they could be found one
after the other. Why it looks as it does; each reason is an attack in tests/attacks:

    sizes, not signs alone       with two rounds of signs n·R is a matrix of whole numbers, whose residues modulo 8 in a dozen known columns
                                 give all others by linear algebra over F_2; and a rotation leaves singular vectors in place, by which two
                                 bundles of one model align
    three rounds, sizes inside   the second moment of the codes shows (R Rᵀ)⁻¹ or (Rᵀ R)⁻¹. With the sizes D one transform away from the
                                 outside, it is H D² H in a secret order, which commutes with 255 signed permutations; they are found by
                                 quadratic assignment on tall or wide matrices, from the codes alone, and spell the outermost
                                 permutation. Two transforms away nothing is found. So columns, which R⁻¹ leaves through S_3, have
                                 the sizes in S_1, and rows, which it leaves through S_1, in S_2

Sizes cost some precision: numbers that are small between the transforms carry the same rounding as large ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cloven.field.hadamard import Rows, transform_, turn
from cloven.field.prg import SecretStream
from cloven.slip.config import SCRAMBLES

ROUNDS = SCRAMBLES["mixing"]
COLUMNS, ROWS = 0, 1  # the round with the sizes, for what multiplies a matrix's columns, and its rows
SPREAD = 0.5  # of the sizes' logarithms, up and down
_ENTRIES = 2**15  # of float64, at a time


@dataclass(frozen=True)
class Mixing:
    """R for vectors of n entries.

    Args:
        gather: places, int32 [rounds, n]: after round i entry j is what was at gather[i, j].
        scale: signs and sizes (and, in a last round, units), float32 [rounds, n].
    """

    gather: Tensor
    scale: Tensor

    def __repr__(self) -> str:
        return f"Mixing({tuple(self.gather.shape)}, <secret>)"

    @classmethod
    def fresh(cls, n: int, stream: SecretStream, sizes_in: int) -> Mixing:
        """Of a secret stream; sizes are in that round: COLUMNS or ROWS."""
        gather = torch.stack([stream.permutation(n).to(torch.int32) for _ in range(ROUNDS)])
        signs = torch.stack([stream.signs(n) for _ in range(ROUNDS)])
        sizes = torch.from_numpy(stream.uniform(n)).sub_(0.5).mul_(2 * SPREAD).exp_()
        signs[sizes_in] *= sizes
        return cls(gather, signs.to(torch.float32))

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
        """Rᵀ x of every row: float64 [M, n] -> float64 [M, n]."""
        return self._back(x, self.scale.numpy().astype(np.float64))

    def undone(self, x: Rows) -> Rows:
        """R⁻¹ x of every row: float64 [M, n] -> float64 [M, n]."""
        return self._back(x, 1 / self.scale.numpy().astype(np.float64))

    def undone_on_rows(self, x: Rows) -> Rows:
        """R⁻ᵀ x of every row: of a matrix whose rows meet vectors that R is applied to. Float64 [M, n] -> float64 [M, n]."""
        if not len(self.gather):
            return x
        sizes = 1 / self.scale.numpy().astype(np.float64)
        result, step = np.empty_like(x), max(1, _ENTRIES // x.shape[1])
        for first in range(0, len(x), step):  # in the cache
            part = x[first : first + step].copy()
            for gather, size in zip(self.gather.numpy(), sizes, strict=True):
                transform_(part)
                part = part.take(gather, axis=1) * size
            result[first : first + step] = part
        return result

    def _back(self, x: Rows, scales: Rows) -> Rows:
        """The rounds in reverse: each entry goes back to where it came from, times its scale."""
        if not len(self.gather):
            return x
        rounds = [(np.argsort(gather), scale) for gather, scale in zip(self.gather.numpy(), scales, strict=True)]
        result, step = np.empty_like(x), max(1, _ENTRIES // x.shape[1])
        for first in range(0, len(x), step):  # in the cache
            part = x[first : first + step]
            for back, scale in reversed(rounds):
                part = (part * scale).take(back, axis=1)
                transform_(part, transposed=True)
            result[first : first + step] = part
        return result
