"""Walsh–Hadamard transforms of blocks of a vector: orthogonal, in n·log2(block) additions.

    H_1 = [1],  H_2h = [[H_h, H_h], [H_h, −H_h]] / √2        [block, block], its own inverse

Blocks lie side by side; where they do not fill the vector, one more takes the entries that are left, and others from all over the vector
that were transformed already (from all over: a transform of most of a block would undo the block's own). The whole is orthogonal for
every length; `transposed` undoes it. Float64; the C++ kernel and NumPy add in the same order and give the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloven.field.native.library import KINDS, kernels_in_use
from cloven.field.native.library import Places as Places
from cloven.field.native.library import Rows as Rows
from cloven.field.native.library import Units as Units

_ENTRIES = 2**15  # of float64, at a time
MOST = 256  # entries of a block: what stays in a core's nearest cache, and its square exceeds nearly all widths


def block_of(n: int) -> int:
    """The largest power of two that is at most n and 256."""
    return min(MOST, 1 << (n.bit_length() - 1))


def transform_(rows: Rows, *, transposed: bool = False) -> None:
    """Transform every row in place: float64 [M, n], dense, n ≥ 1.

    Raises:
        ValueError: another dtype or layout.
    """
    if rows.dtype != np.float64 or rows.ndim != 2 or not rows.flags.c_contiguous or not rows.flags.writeable or not rows.shape[1]:
        raise ValueError("the transform takes dense float64 [M, n]")
    block = block_of(rows.shape[1])
    kernels = kernels_in_use()
    if kernels is not None:
        kernels.hadamard(rows, block, block**-0.5, transposed)
    else:
        transform_in_numpy_(rows, block, transposed)


def turn(x: Rows, gather: Places, units: Units, *, leading: bool) -> Rows:
    """Every row through stages, with a transform between any two of them: stage i takes y_j = x[gather[i, j]]·units[i, j].

    Args:
        x: float64 [M, n], dense; left as it is.
        gather, units: [stages, n], dense, at least one stage.
        leading: also transform before the first stage.

    Raises:
        ValueError: another dtype or layout, or places that are not there.
    """
    _require_stages(x, gather, units)
    kernels, block = kernels_in_use(), block_of(x.shape[1])
    if kernels is not None:
        return kernels.turn(x, gather, units, block, block**-0.5, leading)
    return turn_in_numpy(x, gather, units, leading)


def turn_onto(x: Rows, stages: tuple[Places, Units], total: Tensor, out: Tensor) -> None:
    """out = turn(x) + total, the sum in float64, rounded to float32 and then to the dtype of out: float32 total, any out, dense [M, n].

    Raises:
        ValueError: another dtype, shape or layout, or places that are not there.
    """
    kernels = kernels_in_use()
    if kernels is None or out.dtype not in KINDS:
        out.copy_(torch.from_numpy(turn(x, *stages, leading=False)).add_(total))
        return
    _require_stages(x, *stages)
    block = block_of(x.shape[1])
    kernels.turn_onto(x, *stages, block, block**-0.5, total, out)


def turn_in_numpy(x: Rows, gather: Places, units: Units, leading: bool) -> Rows:
    """The same without the kernel, and its oracle: a few rows at a time, in the cache."""
    result, step = np.empty_like(x), max(1, _ENTRIES // x.shape[1])
    for first in range(0, len(x), step):
        rows = x[first : first + step].copy()
        for stage, (places, unit) in enumerate(zip(gather, units, strict=True)):
            if stage or leading:
                transform_in_numpy_(rows, block_of(x.shape[1]), transposed=False)
            rows = rows.take(places, axis=1) * unit.astype(np.float64)
        result[first : first + step] = rows
    return result


def _require_stages(x: Rows, gather: Places, units: Units) -> None:
    given = ((x, np.float64), (gather, np.int32), (units, np.float32))
    if any(a.dtype != dtype or a.ndim != 2 or not a.flags.c_contiguous for a, dtype in given):
        raise ValueError("stages are dense int32 and float32 [stages, n], rows dense float64 [M, n]")
    if not len(gather) or gather.shape != units.shape or gather.shape[1] != x.shape[1] or not x.shape[1]:
        raise ValueError(f"stages {gather.shape} and {units.shape} do not fit rows of {x.shape[1]}")


def transform_in_numpy_(rows: Rows, block: int, transposed: bool) -> None:
    """The same without the kernel, and its oracle."""
    n = rows.shape[1]
    whole = n // block * block
    steps = [np.arange(whole), last_places(n, block)] if n % block else [np.arange(n)]
    for places in reversed(steps) if transposed else steps:
        width, scale = 1, block**-0.5
        x = rows[:, places].reshape(len(rows), len(places) // block, block)
        while width < block:
            pairs = x.reshape(*x.shape[:2], block // (2 * width), 2, width)
            x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2).reshape(x.shape)
            width *= 2
        rows[:, places] = (x * scale).reshape(len(rows), len(places))


def last_places(n: int, block: int) -> npt.NDArray[np.int64]:
    """What the last block takes where blocks do not fill the vector: entries spread over the others, and those that are left."""
    whole = n // block * block
    spread = block - (n - whole)
    return np.concatenate([np.arange(spread) * whole // spread, np.arange(whole, n)])
