"""The digits' products combined and reduced on a GPU in one pass, where Triton is installed: imported only there.

    parts [4, M, N] int32  ->  Σ_t 256^t·parts[t] mod p, centred: int32 [M, N]

PyTorch does the same in eight passes of int64, which is the oracle: `cloven.field.products.combine`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _combined(parts: Any, out: Any, rows: Any, columns: Any, part: Any, row: Any, BLOCK: tl.constexpr) -> None:
    p = 2147483647
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * columns
    where = at // columns * row + at % columns
    total = tl.load(parts + 3 * part + where, mask=inside, other=0).to(tl.int64)
    total = (total << 8) + tl.load(parts + 2 * part + where, mask=inside, other=0).to(tl.int64)
    total = (total << 8) + tl.load(parts + part + where, mask=inside, other=0).to(tl.int64)
    total = (total << 8) + tl.load(parts + where, mask=inside, other=0).to(tl.int64)
    folded = (total & p) + (total >> 31)  # 2^31 ≡ 1; |total| < 2^60, so this is within ±2^29 of [0, p]
    folded = (folded & p) + (folded >> 31)  # −1 … p + 1
    centred = tl.where(folded > (p - 1) // 2, folded - p, folded)
    tl.store(out + at, centred.to(tl.int32), mask=inside)


def combined_into(parts: Tensor, out: Tensor) -> None:
    """Fill `out`, dense int32 [M, N], from parts int32 [4, M, N] with dense rows, both on one device."""
    _, m, n = parts.shape
    _combined[(triton.cdiv(m * n, _BLOCK),)](parts, out, m, n, parts.stride(0), parts.stride(1), BLOCK=_BLOCK)
