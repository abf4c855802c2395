"""Exact products of residues and int8 matrices: z = c Wᵀ mod p.

    c [M, K] residues    W [N, K] int8, |W| ≤ 127    z [M, N] residues

Two back ends, equal bit for bit (and to Python integers, in the tests):

`int8-digits`   each residue is four balanced base-256 digits, r = Σ_i 256^i·d_i, |d_0..2| ≤ 128, |d_3| ≤ 64; the digits are
                stacked as 4M int8 rows, one int8×int8→int32 product (`torch._int_mm`: VNNI on a CPU, tensor cores on a GPU)
                multiplies them, and Σ_i 2^{8i}·y_i is combined in int64 and reduced.
                128·127·65536 < 2^31, so int32 is exact for inner dimensions up to 65,536; longer ones are cut.
`float64`       a float64 product of whole residues: 2^30·127·65536 < 2^53, exact in any order of summation.

`torch._int_mm` saturates silently on CPUs without VNNI, so a back end is used only after a self-check with all-maximal, all-minimal,
alternating and random values on the device that it will run on (`select_backend`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cloven.errors import RunError
from cloven.field.residues import H, P, centre

MAX_INNER = 65_536  # both back ends are exact up to here
ROWS_AT_A_TIME = 256  # bounds the int32 intermediate [4·rows, N]
_FLOAT64_BYTES_AT_A_TIME = 64 * 2**20
_BALANCE = 0x808080
_FEW_ROWS = 1  # measured: up to here the product with W on the left is faster


@dataclass(frozen=True)
class PlacedMatrix:
    """An int8 matrix [rows, columns] as a back end wants it; `codes` may be padded with zeros."""

    codes: Tensor
    rows: int
    columns: int


class Backend(Protocol):
    """One way to multiply residues by int8 matrices exactly."""

    name: str
    device: torch.device

    def place(self, codes: Tensor) -> PlacedMatrix:
        """Take an int8 matrix [N, K] (a view where possible) for later products."""

    def block(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """c [M, K] · Wᵀ for K ≤ MAX_INNER: residues int32 in, int64 out, congruent to the product."""


def digits(c: Tensor) -> Tensor:
    """Balanced base-256 digits: residues [M, K] int32 -> [4·M, K] int8, digit 0 of every row first.

    Adding 0x808080 turns the three low digits into bytes with an offset of 128, and the exclusive or takes the offset off again.
    """
    m, k = c.shape
    planes = ((c + _BALANCE) ^ _BALANCE).contiguous().view(torch.int8).view(m, k, 4)
    return planes.permute(2, 0, 1).reshape(4 * m, k)  # [M, K, 4] -> [4, M, K] -> [4M, K]


class Int8Digits:
    """int8×int8→int32 through `torch._int_mm`, on a CPU or a CUDA device."""

    name = "int8-digits"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, codes: Tensor) -> PlacedMatrix:
        """On CUDA both sides are padded to multiples of 8, as cuBLASLt wants them."""
        n, k = codes.shape
        if self.device.type == "cuda":
            codes = torch.nn.functional.pad(codes, (0, -k % 8, 0, -n % 8)).to(self.device)
        return PlacedMatrix(codes, n, k)

    def block(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """See `Backend.block`."""
        m = c.shape[0]
        planes = digits(c)
        codes = w.codes
        if w.columns == 1:  # torch._int_mm reads out of bounds on [M, 1] @ [1, N]
            planes, codes = (torch.nn.functional.pad(x, (0, max(0, 2 - x.shape[1]))) for x in (planes, codes))
        if self.device.type == "cuda":  # more than 16 rows, multiples of 8
            planes = torch.nn.functional.pad(planes, (0, codes.shape[1] - planes.shape[1], 0, max(24 - 4 * m, -4 * m % 8)))
        if self.device.type == "cpu" and m <= _FEW_ROWS:  # [N, K] @ [K, 4M]: oneDNN then reads W as it lies, without packing it first
            y = torch._int_mm(codes, planes.t())[: w.rows].t().view(4, m, w.rows)
        else:
            y = torch._int_mm(planes, codes.t())[: 4 * m, : w.rows].view(4, m, w.rows)
        z = y[3].to(torch.int64)
        for i in (2, 1, 0):
            z = z.bitwise_left_shift_(8).add_(y[i])
        return z


class Float64:
    """A float64 product of whole residues: slow, exact, for machines where `torch._int_mm` is wrong."""

    name = "float64"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, codes: Tensor) -> PlacedMatrix:
        """A matrix on the device, unpadded."""
        return PlacedMatrix(codes.to(self.device), *codes.shape)

    def block(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        """See `Backend.block`; W is widened a few rows at a time."""
        step = max(1, _FLOAT64_BYTES_AT_A_TIME // (8 * w.columns))
        c64 = c.to(torch.float64)
        return torch.cat([(c64 @ rows.to(torch.float64).t()).to(torch.int64) for rows in w.codes.split(step)], dim=1)


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
    z = torch.empty((c.shape[0], w.rows), dtype=torch.int32, device=backend.device)
    for rows, out in zip(c.split(ROWS_AT_A_TIME), z.split(ROWS_AT_A_TIME), strict=True):
        out.copy_(centre(backend.block(rows.to(backend.device), w)))
    return z


def self_check(backend: Backend) -> bool:
    """Whether a back end is exact on this machine: extremes that saturate 16- and 32-bit accumulators, and random values."""
    generator = torch.Generator().manual_seed(0)  # public test data, not secrets
    return all(_check_shape(backend, generator, m, n, k) for m, n, k in ((5, 24, 4096), (1, 3, 1), (1, 1, 2)))


def _check_shape(backend: Backend, generator: torch.Generator, m: int, n: int, k: int) -> bool:
    top = torch.tensor(H, dtype=torch.int32)
    alternating = torch.where(torch.arange(k) % 2 == 0, 127, -127).to(torch.int8)
    codes = [
        torch.full((n, k), 127, dtype=torch.int8),
        torch.full((n, k), -127, dtype=torch.int8),
        alternating.expand(n, k).contiguous(),
        torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator),
    ]
    residues = [
        top.expand(m, k).contiguous(),
        (-top).expand(m, k).contiguous(),
        torch.full((m, k), -(128 + 128 * 256 + 128 * 65536), dtype=torch.int32),  # three digits of −128
        torch.randint(-H, H + 1, (m, k), dtype=torch.int32, generator=generator),
    ]
    for w in codes:
        placed = backend.place(w)
        exact = w.to(torch.int64)
        for c in residues:
            low, high = (c & 0xFFFF).to(torch.int64), (c >> 16).to(torch.int64)  # int64 holds both partial sums exactly
            expected = centre((high @ exact.t() % P) * 65536 + low @ exact.t())
            if not torch.equal(multiply(backend, c, placed).cpu(), expected):
                return False
    return True


_selected: dict[str, Backend] = {}
_selecting = threading.Lock()


def select_backend(device: str | torch.device = "cpu") -> Backend:
    """The fastest back end that passes its self-check on `device`; checked once per process and device.

    Raises:
        RunError: no back end is exact there, or there is no such device.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise RunError(f"{device!r} is no device: use cpu, cuda or cuda:N") from error
    with _selecting:
        if str(device) not in _selected:
            for candidate in (Int8Digits(device), Float64(device)):
                try:
                    exact = self_check(candidate)
                except (RuntimeError, AssertionError) as error:  # no such device, or no such operation on it
                    if candidate.name == "float64":
                        raise RunError(f"device {device} cannot be used: {error}") from error
                    continue
                if exact:
                    _selected[str(device)] = candidate
                    break
            else:
                raise RunError(f"no exact product on device {device}: run `cloven doctor`")
        return _selected[str(device)]
