"""What the holder of x does before and after an exchange, in one native call each: see exchange.cpp.

    ask     x [M, K]: turned into the worker's basis, encoded (α), masked                     -> c [M, K], α [M, 1]
    told    z [M, N]: checked; then unmasked, decoded, turned back, added to what is trusted   -> out [M, N]

The same bits as `hadamard.turn`, `codec.encode`, `residues.add`, `Freivalds.check`, `codec.decode` and `hadamard.turn_onto`, one after the
other: they are its oracle. One call instead of eight: for a few rows most of the time was Python's, whose code the worker's product has
driven out of the cache meanwhile.
"""

from __future__ import annotations

import ctypes
import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cloven.field.native.library import KINDS, Kernels, Places, Units

_P, _I, _D, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_DONE, _REFUSED = 0, 1
_NOT_FINITE = 2


class _Side(ctypes.Structure):
    _fields_ = (("n", _I), ("block", _I), ("stages", _I), ("scale", _D), ("gather", _P), ("units", _P))


class _Exchange(ctypes.Structure):
    _fields_ = (("inwards", _Side), ("outwards", _Side))


class Buffers(NamedTuple):
    """What lies between the two passes: c int32 [M, K], α float64 [M, 1], z int32 [M, N], and what is trusted, float32 [M, N]."""

    c: Tensor
    alpha: Tensor
    z: Tensor
    total: Tensor


class _Thread(threading.local):
    """Each thread's memory for one row, for all groups: they take turns. What is sent has its own, which never held anything else."""

    sent = kept = torch.empty(0, dtype=torch.int32)

    def at_least(self, sent: int, kept: int) -> tuple[Tensor, Tensor]:
        if len(self.sent) < sent:
            self.sent = _words(sent)
        if len(self.kept) < kept:
            self.kept = _words(kept)
        return self.sent[:sent], self.kept[:kept]


_thread = _Thread()


def _words(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device="cpu")


class FusedExchange:
    """Both passes of one group.

    Args:
        kernels: the compiled library.
        inwards, outwards: stages [s, K] and [s, N], dense int32 and float32; blocks of the transforms follow from their widths.
        blocks: of the transforms, by width.
    """

    def __init__(self, kernels: Kernels, inwards: tuple[Places, Units], outwards: tuple[Places, Units], blocks: tuple[int, int]) -> None:
        self._held = inwards, outwards  # C++ points into them
        self._kernels = kernels
        self.columns, self.rows = inwards[0].shape[1], outwards[0].shape[1]
        self._exchange = _Exchange(_side(inwards, blocks[0]), _side(outwards, blocks[1]))
        self._address = ctypes.addressof(self._exchange)
        self._own = threading.local()

    def __repr__(self) -> str:
        return f"FusedExchange([{self.rows}, {self.columns}], <secret>)"

    def buffers(self, rows: int) -> Buffers:
        """For so many rows. Those for one row are the thread's, and hold until its next exchange: decoding allocates none."""
        if rows != 1:
            return self._cut(_words(rows * self.columns), _words(2 * rows * self.rows), rows)
        found: Buffers | None = getattr(self._own, "buffers", None)
        if found is None:
            with torch.inference_mode(False):  # they are written to outside of it, too
                found = self._own.buffers = self._cut(*_thread.at_least(self.columns, 2 * self.rows), 1)
        return found

    def _cut(self, sent: Tensor, kept: Tensor, rows: int) -> Buffers:
        z, total = kept.split(rows * self.rows)
        alpha = torch.empty(rows, 1, dtype=torch.float64, device="cpu")
        return Buffers(sent.view(rows, self.columns), alpha, z.view(rows, self.rows), total.view(torch.float32).view(rows, self.rows))

    def ask(self, x: Tensor, bound: float, mask: Tensor, into: Buffers) -> bool:
        """c and α of dense x [M, K], float32 or bfloat16; False where a row is not finite.

        Raises:
            ValueError: something else than that, or places that are not there.
        """
        c, alpha = into.c, into.alpha
        fits = x.dim() == 2 and x.shape == mask.shape == c.shape and x.shape[1] == self.columns and x.dtype in KINDS
        if not fits or mask.dtype != torch.int32 or not (x.is_contiguous() and mask.is_contiguous()):
            raise ValueError(f"rows {tuple(x.shape)}, {x.dtype}, and masks {tuple(mask.shape)} do not fit [{self.rows}, {self.columns}]")
        arguments = (x.data_ptr(), KINDS[x.dtype], len(x), bound, mask.data_ptr(), c.data_ptr(), alpha.data_ptr())
        ended = self._kernels.ask(self._address, *arguments, torch.get_num_threads())
        if ended not in (_DONE, _NOT_FINITE):
            raise ValueError(f"the kernel refuses rows {tuple(x.shape)}")
        return bool(ended == _DONE)

    def told(self, test: Tensor, z: Tensor, image: Tensor, asked: Buffers, out: Tensor) -> int:
        """Fill out [M, N], float32 or bfloat16, from z and image int32 [M, N], and c, α and what is trusted.

        Args:
            test: S ‖ −S W, int32 [2, N + K].

        Returns:
            How many rows are wrong: if there are any, nothing was done.

        Raises:
            ValueError: something else than that, or places that are not there.
        """
        c, alpha, _, total = asked
        m, size = len(z), (len(z), self.rows)
        shapes = z.shape == image.shape == total.shape == out.shape == size and c.shape == (m, self.columns) and alpha.shape == (m, 1)
        whole = {z.dtype, c.dtype, image.dtype, test.dtype} == {torch.int32} and test.shape == (2, self.rows + self.columns)
        real = alpha.dtype == torch.float64 and total.dtype == torch.float32 and out.dtype in KINDS
        if not (shapes and whole and real and all(one.is_contiguous() for one in (test, z, c, image, alpha, total, out))):
            raise ValueError(f"answers {tuple(z.shape)} do not fit [{self.rows}, {self.columns}]")
        arguments = (*(one.data_ptr() for one in (test, z, c, image)), m, *(one.data_ptr() for one in (alpha, total, out)))
        ended: int = self._kernels.told(self._address, *arguments, KINDS[out.dtype], torch.get_num_threads())
        if ended == _REFUSED:
            raise ValueError(f"the kernel refuses answers {tuple(z.shape)}")
        return max(0, ended - 1)


def _side(stages: tuple[Places, Units], block: int) -> _Side:
    gather, units = stages
    if gather.dtype != np.int32 or units.dtype != np.float32 or gather.shape != units.shape or gather.ndim != 2 or not gather.size:
        raise ValueError("stages are int32 and float32 [stages, n]")
    if not (gather.flags.c_contiguous and units.flags.c_contiguous):
        raise ValueError("stages are dense")
    return _Side(gather.shape[1], block, len(gather), block**-0.5, gather.ctypes.data, units.ctypes.data)
