"""The native back end: kernels that read each byte of W once, or pack it once for many rows, and reduce on the spot.

    c [M, K] residues    W [N, K] int8    z = c Wᵀ mod p [M, N] residues

Four planes of unsigned bytes of c mod p meet W in `vpdpbusd` (AVX-512 VNNI, or AVX2 with VNNI), or in 16-bit multiply-adds (AVX2, or
whatever the compiler makes of it elsewhere), see product.cpp; for more rows, by squares, in the matrix unit (AMX) or in AVX-512 VNNI, see
tiles.hpp. Without either, more than 16 rows go to the back end that it is built upon: there PyTorch's product is faster.
"""

from __future__ import annotations

from torch import Tensor

from cloven.field.native.library import KERNEL_NAMES, Kernels
from cloven.field.products import MAX_INNER, Backend, PlacedMatrix

FEW_ROWS = 16  # without kernels for many


class Native:
    """A back end for the CPU: the kernels where they are faster, another exact back end for the rest.

    Args:
        kernels: the compiled library.
        many: an exact back end on the CPU.
    """

    def __init__(self, kernels: Kernels, many: Backend) -> None:
        self.kernels, self._many = kernels, many
        self.name = f"native-{KERNEL_NAMES[kernels.best]}+{many.name}"
        self.device = many.device
        self.most = None if kernels.many else FEW_ROWS  # rows that the kernels are best for

    def place(self, codes: Tensor) -> PlacedMatrix:
        """As the other back end does."""
        return self._many.place(codes)

    def product(self, c: Tensor, w: PlacedMatrix) -> Tensor | None:
        """See `Backend.product`: from a kernel, or none."""
        fits = 0 < c.shape[0] <= (self.most or c.shape[0]) and w.columns <= MAX_INNER and w.codes.stride(1) == 1
        return self.kernels.product(c, w.codes) if fits else None

    def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """As the other back end does."""
        return self._many.parts(c, w)

    def small(self, a: Tensor, w: PlacedMatrix) -> Tensor:
        """As the other back end does."""
        return self._many.small(a, w)
