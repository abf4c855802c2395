"""Which back end multiplies: the fastest one that is exact on the device that it will run on.

A back end is used only after a self-check with all-maximal, all-minimal, alternating and random values: `torch._int_mm` saturates
silently on CPUs without VNNI. CLOVEN_KERNELS=torch leaves the native kernel aside.
"""

from __future__ import annotations

import os
import threading

import torch

from cloven.errors import BadInput, RunError
from cloven.field.native.library import KERNELS, load_kernels
from cloven.field.native.product import Native
from cloven.field.products import Backend, Float64, Int8Digits, multiply
from cloven.field.residues import H, P, centre

_SHAPES = ((5, 24, 4096), (2, 300, 1000), (1, 3, 1), (1, 1, 2), (9, 3, 4096), (33, 70, 130))  # few rows and many: not the same kernels


def self_check(backend: Backend) -> bool:
    """Whether a back end is exact on this machine: extremes that saturate 16- and 32-bit accumulators, and random values."""
    generator = torch.Generator().manual_seed(0)  # public test data, not secrets
    return all(_check_shape(backend, generator, m, n, k) for m, n, k in _SHAPES)


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
    lowest = backend.place(torch.full((n, k), -128, dtype=torch.int8))  # a digit of A_pub, on the side of the weights
    least = torch.full((m, k), -127, dtype=torch.int8)
    return torch.equal(backend.small(least, lowest).cpu(), torch.full((m, n), 127 * 128 * k, dtype=torch.int32))


_selected: dict[str, Backend] = {}
_selecting = threading.Lock()


def _unlock_after_fork() -> None:
    global _selecting
    _selecting = threading.Lock()


os.register_at_fork(after_in_child=_unlock_after_fork)


def select_backend(device: str | torch.device = "cpu") -> Backend:
    """The fastest back end that passes its self-check on `device`; checked once per process and device.

    Raises:
        RunError: no back end is exact there, or there is no such device.
        BadInput: CLOVEN_KERNELS is neither "native" nor "torch".
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise RunError(f"{device!r} is no device: use cpu, cuda or cuda:N") from error
    kernels = os.environ.get(KERNELS) or "native"
    if kernels not in ("native", "torch"):
        raise BadInput(f"{KERNELS}={kernels}: use native (where it is built) or torch")
    with _selecting:
        if (key := f"{device} {kernels}") not in _selected:
            _selected[key] = _select(device, native=kernels == "native")
        return _selected[key]


def _select(device: torch.device, native: bool) -> Backend:
    for candidate in (Int8Digits(device), Float64(device)):
        try:
            exact = self_check(candidate)
        except (RuntimeError, AssertionError) as error:  # no such device, or no such operation on it
            if candidate.name == "float64":
                raise RunError(f"device {device} cannot be used: {error}") from error
            continue
        if exact:
            break
    else:
        raise RunError(f"no exact product on device {device}: run `cloven doctor`")
    if native and device.type == "cpu" and (kernels := load_kernels()) is not None and self_check(faster := Native(kernels, candidate)):
        return faster
    return candidate
