"""y = B (A x) + b for one row x and several linears that share it, in one native call: see low_rank.cpp.

In float32, as PyTorch's products: the same numbers up to the order of their sums. One call instead of six for every linear, which for one
row take longer than the arithmetic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from cloven.field.native.library import KINDS, Kernels

_P, _I = ctypes.c_void_p, ctypes.c_int64


class _Factors(ctypes.Structure):
    _fields_ = (("a", _P), ("b", _P), ("bias", _P), ("rows", _I), ("rank", _I), ("bias_kind", _I))


class LowRank:
    """The factors of linears that share x.

    Args:
        kernels: the compiled library.
        members: A float32 [k, K], B float32 [N, k] and b [N], float32 or bfloat16, or None, of each.

    Raises:
        ValueError: something else.
    """

    def __init__(self, kernels: Kernels, members: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        self._call = kernels.low_rank
        # C++ points into them, and what a parameter holds may be replaced
        self._held = [tensor.detach() for member in members for tensor in member if tensor is not None]
        self.columns = members[0][0].shape[1]
        self.rows = sum(b.shape[0] for _, b, _ in members)
        self._members = (_Factors * len(members))(*(self._described(*member) for member in members))

    @classmethod
    def of(cls, kernels: Kernels, members: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Self | None:
        """None where this CPU, tensors elsewhere or not dense, or a bias of another type leave it to PyTorch."""
        here = all(tensor is None or (tensor.device.type == "cpu" and tensor.is_contiguous()) for member in members for tensor in member)
        fit = all(bias is None or bias.dtype in KINDS for _, _, bias in members)
        return cls(kernels, members) if here and fit and kernels.low_rank(None, 0, None, 1, 0, None) == 0 else None

    def __repr__(self) -> str:
        return f"LowRank([{self.rows}, {self.columns}], <secret>)"

    def onto(self, x: Tensor, out: Tensor) -> None:
        """Fill out, float32 [1, N of all], from dense x [1, K], float32 or bfloat16.

        Raises:
            ValueError: something else than that, or memory is short.
        """
        fits = x.shape == (1, self.columns) and out.shape == (1, self.rows) and x.dtype in KINDS and out.dtype == torch.float32
        if not fits or not (x.is_contiguous() and out.is_contiguous()):
            raise ValueError(f"a row {tuple(x.shape)}, {x.dtype}, does not fit [{self.rows}, {self.columns}]")
        if self._call(self._members, len(self._members), x.data_ptr(), KINDS[x.dtype], self.columns, out.data_ptr()):
            raise ValueError("the kernel has not enough memory")

    def _described(self, a: Tensor, b: Tensor, bias: Tensor | None) -> _Factors:
        rows, rank = b.shape
        shapes = a.shape == (rank, self.columns) and (bias is None or bias.shape == (rows,))
        dense = all(tensor.is_contiguous() for tensor in (a, b, bias) if tensor is not None)
        if not shapes or not dense or not a.dtype == b.dtype == torch.float32 or (bias is not None and bias.dtype not in KINDS):
            raise ValueError("factors are dense float32 [k, K] and [N, k]")
        address, kind = (bias.data_ptr(), KINDS[bias.dtype]) if bias is not None else (None, 0)
        return _Factors(a.data_ptr(), b.data_ptr(), address, rows, rank, kind)
