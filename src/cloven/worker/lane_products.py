"""Products that are served from a lane without Python, one after another: see native/serve.cpp.

    1. a client asks for it, over the lane; the worker answers, and hands its end of the lane to C++
    2. requests are a group's number, the number of rows, and c; answers are z
    3. anything else that comes over the lane ends it; Python answers that, and the client asks again
    4. where answers are metered, C++ takes their rows from a credit, Python's to grant, before it computes; they are rounded

What is computed is the same, by the same kernel: bit for bit. There is none where the kernels or the lane were not built, on CUDA, and
where a transcript is kept.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from cloven.field.native.library import Kernels
from cloven.field.native.product import Native
from cloven.field.products import MAX_INNER, Backend, PlacedMatrix
from cloven.metrics.counts import NATIVE, Counted, ServerCounts
from cloven.wire.lane import Lane

_INTERFACE = 3
_LOOK_SECONDS = 0.25  # how often Python is asked whether to go on
_NOT_YET, _NO_CREDIT = 0, 3
_ANY = 2**31 - 1  # rows
_P, _I = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = (("w", _P), ("n", _I), ("k", _I), ("stride", _I))


class _Serving(ctypes.Structure):
    _fields_ = (("matrices", _P), ("count", _I), ("product", _P), ("kernel", _I), ("credit", _P), ("bits", _I))


class _State(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("answered", "rows", "bytes_in", "bytes_out", "nanoseconds")),
        *((name, ctypes.c_uint32) for name in ("seen", "due", "group", "asked")),
    )

    def counted(self) -> Counted:
        """So far; from any thread, while C++ serves."""
        return Counted(self.answered, self.rows, 0, 0, self.bytes_in, self.bytes_out, 1e-9 * self.nanoseconds)


@cache
def library() -> Any:
    """The compiled loop, or None where it was not built."""
    found = importlib.util.find_spec("cloven.worker.native._serve")
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
        if loaded.cloven_serve_interface() != _INTERFACE:
            return None
        loaded.cloven_serve.argtypes = [_P, _P, _P, _I, ctypes.c_int]
        loaded.cloven_serve.restype = ctypes.c_int
        loaded.cloven_credit_add.argtypes, loaded.cloven_credit_add.restype = [_P, _I], None
        loaded.cloven_credit_take.argtypes, loaded.cloven_credit_take.restype = [_P], _I
    except (OSError, AttributeError):  # built for another machine, or another version
        return None
    return loaded


class Credit:
    """Rows of every group that C++ may still answer over one lane; granted and taken back from any thread."""

    def __init__(self, groups: int) -> None:
        self._rows = (_I * groups)()
        self.address = ctypes.addressof(self._rows)

    def add(self, group: int, rows: int) -> None:
        """Grant rows."""
        library().cloven_credit_add(self.address + 8 * group, rows)

    def take(self, group: int) -> int:
        """Take back what is left; the number of rows."""
        return int(library().cloven_credit_take(self.address + 8 * group))


@dataclass(frozen=True)
class Metered:
    """How answers over one lane are metered.

    Args:
        bits: of every entry that leave: 8 to 16.
        credit: where C++ takes rows from.
        grant: adds at least so many rows of a group to the credit, or raises.
    """

    bits: int
    credit: Credit
    grant: Callable[[int, int], None]


class LaneProducts:
    """Matrices as C++ sees them.

    Args:
        kernels: the compiled kernels.
        groups: the matrices by group number; they must outlive this. Those that the kernels do not take are left out: Python answers.
        most: rows of a request, at most: for more another back end is faster.
    """

    def __init__(self, kernels: Kernels, groups: Sequence[PlacedMatrix | None], most: int) -> None:
        self.most = most
        self._kernels, self._groups = kernels, groups
        self._matrices = (_Matrix * len(groups))(*(_described(w) for w in groups))

    @classmethod
    def of(cls, backend: Backend, groups: Sequence[PlacedMatrix | None]) -> LaneProducts | None:
        """For a back end's matrices; None where it, or the loop, is not compiled."""
        return cls(backend.kernels, groups, backend.most or _ANY) if isinstance(backend, Native) and library() is not None else None

    def serve(self, lane: Lane, going_on: Callable[[], bool], counts: ServerCounts, metered: Metered | None = None) -> None:
        """Answer what comes over the lane, and count it, until something else comes, or `going_on` says no.

        Raises:
            What `metered.grant` raises: the request is left unanswered.
        """
        meter = (metered.credit.address, metered.bits) if metered is not None else (None, 0)
        kernels = self._kernels.product_address, self._kernels.best
        serving, state = _Serving(ctypes.addressof(self._matrices), len(self._matrices), *kernels, *meter), _State()
        with counts.live(NATIVE, state.counted), lane.handed_over(state) as base:
            arguments = ctypes.byref(serving), base, ctypes.byref(state), int(_LOOK_SECONDS * 1e9), torch.get_num_threads()
            while (ended := library().cloven_serve(*arguments)) in (_NOT_YET, _NO_CREDIT):
                if not going_on():
                    return
                if ended == _NO_CREDIT and metered is not None:
                    metered.grant(state.group, state.asked)


def _described(w: PlacedMatrix | None) -> _Matrix:
    if w is None or w.columns > MAX_INNER or w.codes.stride(1) != 1 or w.codes.shape != (w.rows, w.columns):
        return _Matrix()
    return _Matrix(w.codes.data_ptr(), w.rows, w.columns, w.codes.stride(0))
