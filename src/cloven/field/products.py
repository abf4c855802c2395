"""Exact products of residues and int8 matrices: z = c Wᵀ mod p.

    c [M, K] residues    W [N, K] int8, |W| ≤ 127    z [M, N] residues

Back ends, equal bit for bit (and to Python integers, in the tests); a third is `cloven.field.native.product`:

`int8-digits`   each residue is four balanced base-256 digits, r = Σ_i 256^i·d_i, |d_0..2| ≤ 128, |d_3| ≤ 64; the digits are
                stacked as 4M int8 rows, one int8×int8→int32 product (`torch._int_mm`: VNNI on a CPU, tensor cores on a GPU)
                multiplies them, and Σ_i 2^{8i}·y_i is combined in int64 and reduced.
                128·128·65536 < 2^31, so int32 is exact for inner dimensions up to 65,536; longer ones are cut.
`float64`       a float64 product of whole residues: 2^30·127·65536 < 2^53, exact in any order of summation.

`torch._int_mm` saturates silently on CPUs without VNNI: take a back end from `cloven.field.selection`, which checks it first.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cloven.field.residues import centre, centre_, row_blocks

MAX_INNER = 65_536  # both back ends are exact up to here
DIGITS = 4
ROWS_AT_A_TIME = 256
_INT32_BYTES_AT_A_TIME = 64 * 2**20  # bounds the digits' products [4·rows, N]
_FLOAT64_BYTES_AT_A_TIME = 64 * 2**20
_BALANCE = 0x808080
_FEW_ROWS = 16  # measured: up to here the product with W on the left is faster


@dataclass(frozen=True)
class PlacedMatrix:
    """An int8 matrix [rows, columns] as a back end wants it; `codes` may be padded with zeros."""

    codes: Tensor = field(repr=False)
    rows: int
    columns: int


class Backend(Protocol):
    """One way to multiply residues by int8 matrices exactly."""

    name: str
    device: torch.device

    def place(self, codes: Tensor) -> PlacedMatrix:
        """Take an int8 matrix [N, K] (a view where possible) for later products."""

    def product(self, c: Tensor, w: PlacedMatrix) -> Tensor | None:
        """z = c Wᵀ mod p for K ≤ MAX_INNER, int32 [M, N], where the back end reduces on the spot; None: take `parts`."""

    def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """c [M, K] · Wᵀ for K ≤ MAX_INNER in parts: residues int32 in; int32 [T, M, N] out, c Wᵀ ≡ Σ_t 256^t·parts[t] (mod p).

        What is returned is valid until the same thread's next call.
        """

    def small(self, a: Tensor, w: PlacedMatrix) -> Tensor:
        """a [M, K] · Wᵀ for K ≤ MAX_INNER and int8 entries ≥ −128 on the CPU: int32 [M, N], valid until the same thread's next call."""


def digits(c: Tensor) -> Tensor:
    """Balanced base-256 digits: residues [M, K] int32 -> int8 [M, K, 4], digit 0 first.

    Adding 0x808080 turns the three low digits into bytes with an offset of 128, and the exclusive or takes the offset off again.
    """
    if c.is_cuda:
        return ((c + _BALANCE) ^ _BALANCE).contiguous().view(torch.int8).view(*c.shape, DIGITS)
    balanced = np.add(c.numpy(), np.int32(_BALANCE), order="C")
    balanced ^= np.int32(_BALANCE)
    return torch.from_numpy(balanced.view(np.int8).reshape(*c.shape, DIGITS))


class Int8Digits:
    """int8×int8→int32 through `torch._int_mm`, on a CPU or a CUDA device."""

    name = "int8-digits"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._local = threading.local()

    def place(self, codes: Tensor) -> PlacedMatrix:
        """A view, but for a single row; on CUDA both sides are padded to multiples of 8, as cuBLASLt wants them."""
        n, k = codes.shape
        if self.device.type == "cuda":
            codes = torch.nn.functional.pad(codes, (0, -k % 8, 0, -n % 8)).to(self.device)
        elif n == 1:  # torch._int_mm takes the stride of a single row for granted, and a view may have any
            codes = torch.empty(1, k, dtype=torch.int8).copy_(codes)
        return PlacedMatrix(codes, n, k)

    def product(self, c: Tensor, w: PlacedMatrix) -> Tensor | None:
        """See `Backend.product`: none here."""
        del c, w
        return None

    def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """See `Backend.parts`: the products of the digits, T = 4."""
        m, k = c.shape
        planes = digits(c)
        planes = planes.view(k, DIGITS).t() if m == 1 else planes.permute(2, 0, 1).reshape(DIGITS * m, k)  # [4M, K]
        parts: Tensor = self.small(planes, w).unflatten(0, (DIGITS, m))
        return parts

    def small(self, a: Tensor, w: PlacedMatrix) -> Tensor:
        """See `Backend.small`."""
        rows, codes, planes = a.shape[0], w.codes, a
        y: Tensor
        if w.columns == 1:  # torch._int_mm reads out of bounds on [M, 1] @ [1, N]
            planes, codes = (torch.nn.functional.pad(x, (0, max(0, 2 - x.shape[1]))) for x in (planes, codes))
        if self.device.type == "cuda":  # more than 16 rows, multiples of 8
            planes = planes.to(self.device)
            planes = torch.nn.functional.pad(planes, (0, codes.shape[1] - planes.shape[1], 0, max(24 - rows, -rows % 8)))
            y = torch._int_mm(planes, codes.t())[:rows, : w.rows]
        elif rows <= DIGITS * _FEW_ROWS:  # [N, K] @ [K, 4M]: oneDNN then reads W as it lies, without packing it first
            y = torch._int_mm(codes, planes.t()).t()
        else:
            y = torch._int_mm(planes, codes.t(), out=self._scratch(rows, w.rows))
        return y

    def _scratch(self, rows: int, columns: int) -> Tensor:
        """This thread's memory for a product: fresh pages for every product would cost as much as the product itself."""
        memory: Tensor | None = getattr(self._local, "memory", None)
        if memory is None or memory.numel() < rows * columns:
            memory = self._local.memory = torch.empty(rows * columns, dtype=torch.int32)
        return memory[: rows * columns].view(rows, columns)


class Float64:
    """A float64 product of whole residues: slow, exact, for machines where `torch._int_mm` is wrong."""

    name = "float64"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, codes: Tensor) -> PlacedMatrix:
        """A matrix on the device, unpadded."""
        return PlacedMatrix(codes.to(self.device), *codes.shape)

    def product(self, c: Tensor, w: PlacedMatrix) -> Tensor | None:
        """See `Backend.product`: none here."""
        del c, w
        return None

    def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """See `Backend.parts`: the product itself, T = 1; W is widened a few rows at a time."""
        step = max(1, _FLOAT64_BYTES_AT_A_TIME // (8 * w.columns))
        c64 = c.to(torch.float64)
        return torch.cat([centre((c64 @ rows.to(torch.float64).t()).to(torch.int64)) for rows in w.codes.split(step)], dim=1)[None]

    def small(self, a: Tensor, w: PlacedMatrix) -> Tensor:
        """See `Backend.small`: |y| ≤ 128·127·65536 < p/2, so that reduction changes nothing."""
        return self.parts(a, w)[0]


def multiply(backend: Backend, c: Tensor, w: PlacedMatrix) -> Tensor:
    """z = c Wᵀ mod p, exactly.

    Args:
        c: residues, int32 [M, K], on any device.
        w: an int8 matrix [N, K] placed by the same back end.

    Returns:
        residues, int32 [M, N], on the back end's device.
    """
    if w.columns > MAX_INNER:
        total = torch.zeros((c.shape[0], w.rows), dtype=torch.int64, device=backend.device)
        for part, codes in zip(c.split(MAX_INNER, 1), w.codes[: w.rows, : w.columns].split(MAX_INNER, 1), strict=True):
            total += multiply(backend, part, backend.place(codes))
        return centre(total)
    if (reduced := backend.product(c, w)) is not None:
        return reduced
    z = torch.empty((c.shape[0], w.rows), dtype=torch.int32, device=backend.device)
    step = max(1, min(ROWS_AT_A_TIME, _INT32_BYTES_AT_A_TIME // (4 * DIGITS * w.rows)))
    for rows, out in row_blocks(step, c, z):
        combine(backend.parts(rows.to(backend.device), w), out)
    return z


def combine(parts: Tensor, out: Tensor) -> None:
    """Σ_t 256^t·parts[t] mod p: int32 [T, M, N] -> `out`, residues, int32 [M, N]. On a CPU row by row, in the cache."""
    if parts.is_cuda:
        fused = one_pass(parts.device) if parts.shape[0] == DIGITS and parts.stride(2) == 1 and out.is_contiguous() else None
        (fused or combine_in_passes)(parts, out)
    else:
        y, z = parts.numpy(), out.numpy()
        for row in range(z.shape[0]):
            _combine(y[:, row], z[row], y[-1, row].astype(np.int64))


@functools.cache
def one_pass(device: torch.device) -> Callable[[Tensor, Tensor], None] | None:
    """The same in one pass, for the digits' products on a GPU; None where Triton is missing, does not work, or is wrong."""
    try:
        from cloven.field.triton_combine import combined_into

        parts = torch.randint(-(2**31), 2**31, (DIGITS, 3, 5), generator=torch.Generator().manual_seed(0)).to(torch.int32).to(device)
        found, expected = (torch.empty(3, 5, dtype=torch.int32, device=device) for _ in range(2))
        combined_into(parts, found)
    except Exception:  # Triton compiles on the spot, and much can be missing for that
        return None
    combine_in_passes(parts, expected)
    return combined_into if torch.equal(found, expected) else None


def combine_in_passes(parts: Tensor, out: Tensor) -> None:
    """The same on any device, in passes of int64."""
    _combine(parts, out, parts[-1].to(torch.int64))


def _combine(parts: Any, out: Any, total: Any) -> None:
    """For tensors or arrays; `total` holds the highest part and is overwritten. |total| < 2^31·2^24·(1 + 2^-7) < 2^60."""
    for t in reversed(range(parts.shape[0] - 1)):
        total <<= 8
        total += parts[t]
    centre_(total)
    out[...] = total
