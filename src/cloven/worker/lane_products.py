"""Products that are served from a lane without Python, one after another: see native/serve.cpp.

    1. a client asks for it, over the lane; the worker answers, and hands its end of the lane to C++
    2. requests are a group's number, the number of rows, and c; answers are z
    3. anything else that comes over the lane ends it; Python answers that, and the client asks again

What is computed is the same, by the same kernel: bit for bit. There is none where the kernels or the lane were not built, on CUDA, and
where a transcript is kept.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from cloven.field.native.library import Kernels
from cloven.field.native.product import Native
from cloven.field.products import MAX_INNER, Backend, PlacedMatrix
from cloven.metrics.counts import NATIVE, Counted, ServerCounts
from cloven.wire.lane import Lane

_INTERFACE = 2
_LOOK_SECONDS = 0.25  # how often a silent lane's other end is looked at
_NOT_YET = 0
_ANY = 2**31 - 1  # rows
_P, _I = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = (("w", _P), ("n", _I), ("k", _I), ("stride", _I))


class _Serving(ctypes.Structure):
    _fields_ = (("matrices", _P), ("count", _I), ("product", _P), ("kernel", _I))


class _State(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("answered", "rows", "bytes_in", "bytes_out", "nanoseconds")),
        ("seen", ctypes.c_uint32),
        ("due", ctypes.c_uint32),
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
    except (OSError, AttributeError):  # built for another machine, or another version
        return None
    return loaded


class LaneProducts:
    """Matrices as C++ sees them.

    Args:
        kernels: the compiled kernels.
        groups: the matrices by group number; they must outlive this. Those that the kernels do not take are left out: Python answers.
        most: rows of a request, at most: for more another back end is faster.
    """

    def __init__(self, kernels: Kernels, groups: Sequence[PlacedMatrix | None], most: int) -> None:
        self.most = most
        self._groups = groups
        self._matrices = (_Matrix * len(groups))(*(_described(w) for w in groups))
        self._serving = _Serving(ctypes.addressof(self._matrices), len(groups), kernels.product_address, kernels.best)

    @classmethod
    def of(cls, backend: Backend, groups: Sequence[PlacedMatrix | None]) -> LaneProducts | None:
        """For a back end's matrices; None where it, or the loop, is not compiled."""
        return cls(backend.kernels, groups, backend.most or _ANY) if isinstance(backend, Native) and library() is not None else None

    def serve(self, lane: Lane, going_on: Callable[[], bool], counts: ServerCounts) -> None:
        """Answer what comes over the lane, and count it, until something else comes, or `going_on` says no."""
        state = _State()
        with counts.live(NATIVE, state.counted), lane.handed_over(state) as base:
            arguments = ctypes.byref(self._serving), base, ctypes.byref(state), int(_LOOK_SECONDS * 1e9), torch.get_num_threads()
            while library().cloven_serve(*arguments) == _NOT_YET:
                if not going_on():
                    return


def _described(w: PlacedMatrix | None) -> _Matrix:
    if w is None or w.columns > MAX_INNER or w.codes.stride(1) != 1 or w.codes.shape != (w.rows, w.columns):
        return _Matrix()
    return _Matrix(w.codes.data_ptr(), w.rows, w.columns, w.codes.stride(0))
