"""The prime field F_p, p = 2^31 − 1, with centred residues.

A residue is an int32 in [−H, H], H = (p − 1)/2 = 2^30 − 1. Anything outside is malformed, on both sides of the wire. The field
is prime, and not Z_2^k, because a Freivalds check over Z_2^k misses errors that are multiples of a high power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloven.field.native.library import kernels_in_use

P = 2**31 - 1
H = (P - 1) // 2


def centre(x: Tensor) -> Tensor:
    """Reduce integers modulo p to centred residues.

    Args:
        x: integers, any shape, |x| < 2^60.

    Returns:
        int32 of the same shape, in [−H, H], congruent to x modulo p.
    """
    x = x.to(torch.int64, copy=True)
    centre_(x)
    return x.to(torch.int32)


def centre_(x: Tensor | npt.NDArray[np.int64]) -> None:
    """`centre` in place, for a tensor or an array.

    2^31 ≡ 1 (mod p), so x = (x >> 31)·2^31 + (x & p) ≡ (x >> 31) + (x & p) =: y, which lies in [−2^29, 2^31 + 2^29). Then
    k = (y + 2^30) >> 31 is 1 where y > H and 0 elsewhere, and y − k·p is centred.
    """
    k = x >> 31
    x &= P
    x += k
    k = x + (H + 1)
    k >>= 31
    k *= P
    x -= k


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b mod p for residues of the same shape, int32 on the CPU."""
    kernels = kernels_in_use()
    return kernels.add(a, b, 1) if kernels is not None and a.dim() else _wrapped(np.add, a, b)


def subtract(a: Tensor, b: Tensor) -> Tensor:
    """a − b mod p for residues of the same shape, int32 on the CPU."""
    kernels = kernels_in_use()
    return kernels.add(a, b, -1) if kernels is not None and a.dim() else _wrapped(np.subtract, a, b)


def _wrapped(operation: np.ufunc, a: Tensor, b: Tensor) -> Tensor:
    """Without the kernel, and its oracle.

    |a ± b| ≤ 2H < 2^31, so one correction by p is enough: what sticks out above H loses p, below −H gains it.
    """
    result = np.empty(a.shape, np.int32)
    for x, y, out in zip(*(np.atleast_2d(array) for array in (a.numpy(), b.numpy(), result)), strict=True):
        operation(x, y, out=out)
        excess = (out > H).view(np.int8)
        excess -= (out < -H).view(np.int8)
        out -= np.multiply(excess, P, dtype=np.int32)
    return torch.from_numpy(result)


def row_blocks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk through the rows of tensors with the same number of rows, `rows` at a time, so that intermediates stay in the cache."""
    if tensors[0].shape[0] <= rows:
        yield tensors
    else:
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def is_residue(x: Tensor) -> bool:
    """Whether every entry of an int32 tensor on the CPU is a centred residue."""
    kernels = kernels_in_use()
    if kernels is not None and x.is_contiguous():
        return kernels.are_residues(x)
    values = x.numpy()
    return not values.size or (int(values.min()) >= -H and int(values.max()) <= H)
