"""The native back end: for few rows, a kernel that reads each byte of W once and reduces on the spot.

    c [M ≤ 16, K] residues    W [N, K] int8    z = c Wᵀ mod p [M, N] residues

Four planes of unsigned bytes of c mod p meet W in `vpdpbusd` (AVX-512 VNNI), or in 16-bit multiply-adds (AVX2, or whatever the compiler
makes of it elsewhere); see product.cpp. More rows go to the back end that it is built upon: there PyTorch's product is faster.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloven.field.products import MAX_INNER, Backend, PlacedMatrix

FEW_ROWS = 16
INTERFACE = 2  # of the library: what its functions take
KERNEL_NAMES = ("portable", "avx2", "avx512-vnni")


class Kernels:
    """The compiled library.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        if library.cloven_interface() != INTERFACE:
            raise OSError(f"{path}: kernels of another version: install cloven again")
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        library.cloven_product.argtypes = [pointer, integer, integer, pointer, integer, integer, pointer, ctypes.c_int, ctypes.c_int]
        library.cloven_hadamard.argtypes = [pointer, integer, integer, integer, ctypes.c_double, ctypes.c_int]
        library.cloven_turn.argtypes = [
            *(pointer, integer, integer, integer, ctypes.c_double),
            *(integer, pointer, pointer, ctypes.c_int, pointer, ctypes.c_int),
        ]
        library.cloven_hadamard.restype = library.cloven_turn.restype = ctypes.c_int
        library.cloven_product.restype = library.cloven_kernel.restype = ctypes.c_int
        self._library = library
        self.best: int = library.cloven_kernel()

    def product(self, c: Tensor, w: Tensor, kernel: int | None = None) -> Tensor:
        """c Wᵀ mod p: residues int32 [M, K], int8 [N, K] with dense rows, K ≤ MAX_INNER -> residues int32 [M, N].

        Raises:
            ValueError: arguments out of range, or a kernel that this CPU lacks.
        """
        (m, k), n = c.shape, w.shape[0]
        if c.dtype != torch.int32 or w.dtype != torch.int8 or w.shape[1] != k or w.stride(1) != 1:
            raise ValueError("the kernel takes int32 [M, K] and int8 [N, K] with dense rows")
        c = c.contiguous()
        z = torch.empty(m, n, dtype=torch.int32)
        arguments = (c.data_ptr(), m, k, w.data_ptr(), n, w.stride(0), z.data_ptr())
        if self._library.cloven_product(*arguments, torch.get_num_threads(), self.best if kernel is None else kernel):
            raise ValueError(f"the kernel refuses {m} x {n} x {k}")
        return z

    def hadamard(self, rows: npt.NDArray[np.float64], block: int, scale: float, transposed: bool) -> None:
        """Transform blocks of dense rows [M, n] in place, see `cloven.field.hadamard`.

        Raises:
            ValueError: no such block.
        """
        m, n = rows.shape
        if self._library.cloven_hadamard(rows.ctypes.data, m, n, block, scale, int(transposed)):
            raise ValueError(f"the kernel refuses blocks of {block} of {n}")

    def turn(
        self,
        x: npt.NDArray[np.float64],
        gather: npt.NDArray[np.int32],
        units: npt.NDArray[np.float32],
        block: int,
        scale: float,
        leading: bool,
    ) -> npt.NDArray[np.float64]:
        """Dense rows [m, n] turned by stages [s, n], see `cloven.field.hadamard`.

        Raises:
            ValueError: no such block, or places that are not there.
        """
        out = np.empty_like(x)
        (m, n), addresses = x.shape, (gather.ctypes.data, units.ctypes.data)
        arguments = (x.ctypes.data, m, n, block, scale, len(gather), *addresses, int(leading), out.ctypes.data, torch.get_num_threads())
        if self._library.cloven_turn(*arguments):
            raise ValueError(f"the kernel refuses stages of {n} places with blocks of {block}")
        return out


@cache
def load_kernels() -> Kernels | None:
    """The kernels, or None where they were not built."""
    found = importlib.util.find_spec("cloven.field.native._kernels")
    try:
        return Kernels(found.origin) if found is not None and found.origin is not None else None
    except (OSError, AttributeError):  # built for another machine, or another version
        return None


class Native:
    """A back end for the CPU: the kernel for few rows, another exact back end for the rest.

    Args:
        kernels: the compiled library.
        many: an exact back end on the CPU.
    """

    def __init__(self, kernels: Kernels, many: Backend) -> None:
        self._kernels, self._many = kernels, many
        self.name = f"native-{KERNEL_NAMES[kernels.best]}+{many.name}"
        self.device = many.device

    def place(self, codes: Tensor) -> PlacedMatrix:
        """As the other back end does."""
        return self._many.place(codes)

    def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """See `Backend.parts`: the product itself, T = 1, from the kernel."""
        if 0 < c.shape[0] <= FEW_ROWS and w.columns <= MAX_INNER and w.codes.stride(1) == 1:
            return self._kernels.product(c, w.codes)[None]
        return self._many.parts(c, w)

    def small(self, a: Tensor, w: PlacedMatrix) -> Tensor:
        """As the other back end does."""
        return self._many.small(a, w)
