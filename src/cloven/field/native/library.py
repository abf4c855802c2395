"""The compiled kernels: loaded once, called through a plain C interface; absent where there was no compiler.

Everything here has an oracle in Python that gives the same bits: `cloven.field.products`, `hadamard`, `residues`, `codec`, `freivalds`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KERNELS = "CLOVEN_KERNELS"  # native, or torch
INTERFACE = 10  # of the library: what its functions take
KINDS = {torch.float32: 1, torch.bfloat16: 2}  # of a sum
Rows = npt.NDArray[np.float64]
Places = npt.NDArray[np.int32]
Units = npt.NDArray[np.float32]
KERNEL_NAMES = ("portable", "avx2", "avx2-vnni", "avx512-vnni", "amx")


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
            *(integer, pointer, pointer, ctypes.c_int, pointer, pointer, ctypes.c_int, ctypes.c_int),
        ]
        library.cloven_hadamard.restype = library.cloven_turn.restype = ctypes.c_int
        number = ctypes.c_int
        library.cloven_add.argtypes = [pointer, pointer, integer, integer, number, pointer, number]
        library.cloven_encode.argtypes = [pointer, integer, integer, ctypes.c_double, pointer, pointer, pointer, number]
        library.cloven_decode.argtypes = [pointer, integer, integer, pointer, pointer, number]
        library.cloven_check.argtypes = [pointer, pointer, pointer, integer, integer, integer, pointer, number]
        library.cloven_residues.argtypes, library.cloven_residues.restype = [pointer, integer], number
        library.cloven_product.restype = library.cloven_kernel.restype = library.cloven_many_rows.restype = ctypes.c_int
        library.cloven_ask.argtypes = [pointer, pointer, number, integer, ctypes.c_double, pointer, pointer, pointer, number]
        library.cloven_told.argtypes = [*(pointer,) * 5, integer, pointer, pointer, pointer, number, number]
        library.cloven_query.argtypes = [pointer, integer, integer, integer, ctypes.c_double, pointer, pointer, pointer, number]
        library.cloven_answer.argtypes = [pointer, number, pointer, integer, integer, pointer, pointer, number]
        library.cloven_low_rank.argtypes = [pointer, integer, pointer, number, integer, pointer]
        for one in (library.cloven_ask, library.cloven_told, library.cloven_query, library.cloven_answer, library.cloven_low_rank):
            one.restype = ctypes.c_int
        self.low_rank = library.cloven_low_rank
        self._library, self.ask, self.told = library, library.cloven_ask, library.cloven_told
        self.query, self.answer = library.cloven_query, library.cloven_answer
        library.cloven_runs.argtypes, library.cloven_runs.restype = [number], number
        self.best: int = library.cloven_kernel()
        self.many = bool(library.cloven_many_rows())  # whether it is fast for any number of rows
        self.there = tuple(kernel for kernel in range(len(KERNEL_NAMES)) if library.cloven_runs(kernel))  # on this CPU
        self.product_address = ctypes.cast(library.cloven_product, pointer).value

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

    def hadamard(self, rows: Rows, block: int, scale: float, transposed: bool) -> None:
        """Transform blocks of dense rows [M, n] in place, see `cloven.field.hadamard`.

        Raises:
            ValueError: no such block.
        """
        m, n = rows.shape
        if self._library.cloven_hadamard(rows.ctypes.data, m, n, block, scale, int(transposed)):
            raise ValueError(f"the kernel refuses blocks of {block} of {n}")

    def turn(self, x: Rows, gather: Places, units: Units, block: int, scale: float, leading: bool) -> Rows:
        """Dense rows [m, n] turned by stages [s, n], see `cloven.field.hadamard`.

        Raises:
            ValueError: no such block, or places that are not there.
        """
        out = np.empty_like(x)
        self._turn(x, gather, units, block, scale, leading, None, out.ctypes.data, 0)
        return out

    def turn_onto(self, x: Rows, gather: Places, units: Units, block: int, scale: float, total: Tensor, out: Tensor) -> None:
        """The same, with total [m, n] added, into out: dense, float32, and float32 or bfloat16.

        Raises:
            ValueError: as of `turn`, or they are something else.
        """
        if total.dtype != torch.float32 or out.dtype not in KINDS or not (total.is_contiguous() and out.is_contiguous()):
            raise ValueError("the kernel adds dense float32, and gives dense float32 or bfloat16")
        if not total.shape == out.shape == x.shape:
            raise ValueError(f"rows of shape {x.shape} do not fit {tuple(total.shape)} and {tuple(out.shape)}")
        self._turn(x, gather, units, block, scale, False, total.data_ptr(), out.data_ptr(), KINDS[out.dtype])

    def _turn(
        self, x: Rows, gather: Places, units: Units, block: int, scale: float, leading: bool, total: int | None, out: int, kind: int
    ) -> None:
        (m, n), stages = x.shape, (len(gather), gather.ctypes.data, units.ctypes.data)
        if self._library.cloven_turn(x.ctypes.data, m, n, block, scale, *stages, leading, total, out, kind, torch.get_num_threads()):
            raise ValueError(f"the kernel refuses stages of {n} places with blocks of {block}")

    def add(self, a: Tensor, b: Tensor, sign: int) -> Tensor:
        """a + sign·b mod p for residues of one shape [..., n], int32.

        Raises:
            ValueError: something else.
        """
        if a.shape != b.shape or not a.dtype == b.dtype == torch.int32:
            raise ValueError(f"the kernel adds int32 of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
        a, b = a.contiguous(), b.contiguous()
        out, n = torch.empty_like(a), a.shape[-1]
        self._library.cloven_add(a.data_ptr(), b.data_ptr(), a.numel() // max(1, n), n, sign, out.data_ptr(), torch.get_num_threads())
        return out

    def are_residues(self, x: Tensor) -> bool:
        """Whether every entry of a dense int32 tensor is in [−H, H].

        Raises:
            ValueError: something else.
        """
        if x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError("the kernel looks at dense int32")
        return bool(self._library.cloven_residues(x.data_ptr(), x.numel()))

    def encode(self, x: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
        """round(α x) int32 [M, K] and α float64 [M, 1] of float64 [M, K], α = scale / ‖x‖; None where a row is not finite.

        Raises:
            ValueError: something else.
        """
        if x.dtype != torch.float64 or x.dim() != 2:
            raise ValueError("the kernel encodes float64 [M, K]")
        x, (m, k) = x.contiguous(), x.shape
        out, alpha = torch.empty(m, k, dtype=torch.int32), torch.empty(m, 1, dtype=torch.float64)
        found = torch.empty(m, dtype=torch.int32)
        arguments = (x.data_ptr(), m, k, scale, out.data_ptr(), alpha.data_ptr(), found.data_ptr())
        self._library.cloven_encode(*arguments, torch.get_num_threads())
        return None if found.any() else (out, alpha)

    def decode(self, y: Tensor, alpha: Tensor) -> Tensor:
        """y / α: int32 [M, N] and float64 [M, 1] -> float64 [M, N].

        Raises:
            ValueError: something else.
        """
        if y.dtype != torch.int32 or y.dim() != 2 or alpha.dtype != torch.float64 or alpha.shape != (len(y), 1):
            raise ValueError("the kernel decodes int32 [M, N] by float64 [M, 1]")
        y, alpha, (m, n) = y.contiguous(), alpha.contiguous(), y.shape
        out = torch.empty(m, n, dtype=torch.float64)
        self._library.cloven_decode(y.data_ptr(), m, n, alpha.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out

    def wrong_rows(self, test: Tensor, z: Tensor, c: Tensor) -> int:
        """How many rows of z ‖ c [M, N + K] do not satisfy test · (z ‖ c) = 0 mod p, for residues; test int32 [2, N + K].

        Raises:
            ValueError: something else.
        """
        fits = z.dim() == c.dim() == 2 and len(z) == len(c) and test.shape == (2, z.shape[1] + c.shape[1]) and test.is_contiguous()
        if not fits or not test.dtype == z.dtype == c.dtype == torch.int32:
            raise ValueError(f"the kernel checks int32 by a dense test, not {tuple(z.shape)} and {tuple(c.shape)} by {tuple(test.shape)}")
        z, c = z.contiguous(), c.contiguous()
        found = torch.empty(len(z), dtype=torch.int32)
        sizes = (len(z), z.shape[1], c.shape[1])
        self._library.cloven_check(test.data_ptr(), z.data_ptr(), c.data_ptr(), *sizes, found.data_ptr(), torch.get_num_threads())
        return int(found.sum())


def kernels_in_use() -> Kernels | None:
    """The kernels, or None where they were not built, or CLOVEN_KERNELS says that PyTorch and NumPy do the work."""
    return load_kernels() if os.environ.get(KERNELS) != "torch" else None


@cache
def load_kernels() -> Kernels | None:
    """The kernels, or None where they were not built."""
    found = importlib.util.find_spec("cloven.field.native._kernels")
    try:
        return Kernels(found.origin) if found is not None and found.origin is not None else None
    except (OSError, AttributeError):  # built for another machine, or another version
        return None
