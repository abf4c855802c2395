"""What a client of private LoRA does to rows before and after a query, in one native call each: see query.cpp.

    query    x [M, K]: encoded (α), behind zeros on the pad columns, masked      -> c [M, D], α [M, 1]
    answer   q [M, N]: the middles of its intervals, unmasked, decoded            -> y [M, N]

The same bits as `codec.encode`, `residues.add`, `private_lora.messages.unrounded`, `residues.subtract` and `codec.decode`, one after the
other: they are its oracle.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cloven.field.native.library import Kernels

_DONE, _NOT_ALLOWED = 0, 2


def query(kernels: Kernels, x: Tensor, pad: int, bound: float, mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """c int32 [M, D] and α float64 [M, 1], ∞ for rows of zeros; None where a row is not finite.

    Args:
        x: float64 [M, K], M > 0.
        pad: columns before those of x.
        bound: α‖x‖, see `codec.scale_of`.
        mask: residues int32 [M, D], D = pad + K.

    Raises:
        ValueError: something else.
    """
    fits = x.dim() == 2 and mask.shape == (len(x), pad + x.shape[1]) and x.dtype == torch.float64 and mask.dtype == torch.int32
    if not fits:
        raise ValueError(f"rows {tuple(x.shape)}, {x.dtype}, and masks {tuple(mask.shape)} do not fit, behind {pad} columns")
    x, mask, (m, k) = x.contiguous(), mask.contiguous(), x.shape
    c, alpha = torch.empty_like(mask), torch.empty(m, 1, dtype=torch.float64)
    threads = torch.get_num_threads()
    ended = kernels.query(x.data_ptr(), m, k, pad, bound, mask.data_ptr(), c.data_ptr(), alpha.data_ptr(), threads)
    if ended == _NOT_ALLOWED:
        return None
    if ended != _DONE:
        raise ValueError(f"the kernel refuses rows {tuple(x.shape)}")
    return c, alpha


def answer(kernels: Kernels, q: Tensor | memoryview, bits: int, image: Tensor, alpha: Tensor) -> Tensor | None:
    """y float64 [M, N]; None where a number has more than `bits` bits.

    Args:
        q: M·N numbers, in one byte each for 8 bits, else in two; dense.
        image: residues int32 [M, N], M > 0.
        alpha: float64 [M, 1].

    Raises:
        ValueError: something else.
    """
    fits = image.dim() == 2 and image.dtype == torch.int32 and alpha.dtype == torch.float64 and alpha.shape == (len(image), 1)
    if not fits or q.nbytes != image.numel() * (1 if bits == 8 else 2):
        raise ValueError(f"{q.nbytes} bytes of {bits} bits do not fit images {tuple(image.shape)} and α {tuple(alpha.shape)}")
    image, alpha, (m, n) = image.contiguous(), alpha.contiguous(), image.shape
    y = torch.empty(m, n, dtype=torch.float64)
    numbers: int = q.data_ptr() if isinstance(q, Tensor) else np.frombuffer(q, np.uint8).ctypes.data
    arguments = (bits, image.data_ptr(), m, n, alpha.data_ptr(), y.data_ptr(), torch.get_num_threads())
    ended = kernels.answer(numbers, *arguments)
    if ended == _NOT_ALLOWED:
        return None
    if ended != _DONE:
        raise ValueError(f"the kernel refuses {bits} bits of answers {tuple(image.shape)}")
    return y
