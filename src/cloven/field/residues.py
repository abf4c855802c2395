"""The prime field F_p, p = 2^31 − 1, with centred residues.

A residue is an int32 in [−H, H], H = (p − 1)/2 = 2^30 − 1. Anything outside is malformed, on both sides of the wire. The field
is prime, and not Z_2^k, because a Freivalds check over Z_2^k misses errors that are multiples of a high power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

P = 2**31 - 1
H = (P - 1) // 2


def centre(x: Tensor) -> Tensor:
    """Reduce integers modulo p to centred residues.

    Args:
        x: int64, any shape, any value.

    Returns:
        int32 of the same shape, in [−H, H], congruent to x modulo p.

    2^31 ≡ 1 (mod p), so x = (x >> 31)·2^31 + (x & p) ≡ (x >> 31) + (x & p). One fold takes 64 bits to [−2^32, 2^32 + p], a second
    one to [−2, p + 2]; what lies above H then loses p.
    """
    x = (x & P) + (x >> 31)
    x = (x & P) + (x >> 31)
    return torch.where(x > H, x - P, x).to(torch.int32)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b mod p for residues of the same shape, int32: |a + b| ≤ 2H < 2^31, so one correction by p is enough."""
    total = a + b
    return total.add_(total.clamp(-H, H).sub_(total).sign_().mul_(P))  # what sticks out above H loses p, below −H gains it


def subtract(a: Tensor, b: Tensor) -> Tensor:
    """a − b mod p for residues of the same shape, int32."""
    return add(a, -b)


def row_blocks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk through the rows of tensors with the same number of rows, `rows` at a time, so that intermediates stay in the cache."""
    if tensors[0].shape[0] <= rows:
        yield tensors
    else:
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def is_residue(x: Tensor) -> bool:
    """Whether every entry of an int32 tensor is a centred residue."""
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return bool(low >= -H) and bool(high <= H)
