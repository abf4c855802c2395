"""The enclave's arithmetic in C++; and a pass of the model, authorised at once and then served without Python:

    1. `Enclave.begin` checks and counts the rows of all layers, as `key` and `restore` would one by one
    2. the lane is handed to native/step.cpp: the calls of every layer, in order, each once, with sizes that follow from the shapes
    3. what comes instead of the next call ends the pass; `Enclave.end` gives back the rows that no call was made for

Where it stands in for Python, results agree up to the order of sums. Tensors that C++ points into are held until the pass has ended.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from cloven.kv_shield.keys import SessionKeys
from cloven.kv_shield.rotary import RotaryGather
from cloven.kv_shield.shapes import AttentionShape, calls_of
from cloven.metrics.counts import NATIVE, Counted, ServerCounts
from cloven.wire.lane import Lane

_INTERFACE = 5
_LOOK_SECONDS = 0.25  # how often a silent lane's other end is looked at
_NOT_YET = 0
_P, _I = ctypes.c_void_p, ctypes.c_int64


class _CLayer(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("heads", "kv_heads", "head_dim", "noise", "keyed", "period")),
        *((name, _P) for name in ("partner", "cosine", "sine", "norms")),
        ("epsilon", ctypes.c_double),
        *((name, _P) for name in ("restore", "kv", "inverse", "random")),
    )


class _CStep(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("bfloat16", "batch", "rows", "layers")),
        *((name, _P) for name in ("cos", "sin")),
        *((name, _I) for name in ("cos_width", "sin_width")),
        ("layer", _P),
    )


class _CState(ctypes.Structure):
    _fields_ = (("call", _I), ("nanoseconds", _I), ("seen", ctypes.c_uint32), ("due", ctypes.c_uint32), ("cancelled", ctypes.c_uint32))


@cache
def library() -> Any:
    """The compiled library, or None where it was not built."""
    found = importlib.util.find_spec("cloven.kv_shield.native._step")
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
        if loaded.cloven_step_interface() != _INTERFACE:
            return None
        loaded.cloven_step_serve.argtypes = [_P, _P, _P, _I, ctypes.c_int]
        loaded.cloven_step_compute.argtypes = [_P, _I, ctypes.c_int, _P, _P, ctypes.c_int]
        loaded.cloven_step_compute.restype = None
    except (OSError, AttributeError):  # built for another machine, or another version
        return None
    return loaded


class LayerOfStep(Protocol):
    """What a pass needs of a layer of the enclave."""

    @property
    def shape(self) -> AttentionShape:
        """Heads and their width."""

    @property
    def norms(self) -> Tensor | None:
        """Weights of the heads' norms [H + G, d]."""

    @property
    def gather(self) -> RotaryGather | None:
        """How it rotates."""

    @property
    def restore(self) -> Tensor | None:
        """π_v⁻¹ over all heads; None in session mode."""


@dataclass(repr=False, eq=False)
class EnclaveStep:
    """One authorised pass.

    Args:
        name: the session's; `first` is the place of its first row in the caches.
        step: for C++.
        calls: layer and kind (whether it keys) of every call, in order.
        sizes: bytes in and out of so many calls, from none to all.
        held: what C++ points into.
    """

    name: bytes
    first: int
    rows: int
    step: _CStep
    calls: Sequence[tuple[int, bool]]
    sizes: Sequence[tuple[int, int]]
    held: Any
    state: _CState = field(default_factory=_CState)

    def counted(self) -> Counted:
        """The calls answered so far; from any thread, while C++ serves. A place of a sequence is a token where it is through all layers."""
        done, places = self.state.call, self.step.batch * self.rows
        tokens = places if done == len(self.calls) else 0
        bytes_in, bytes_out = self.sizes[done]
        return Counted(done, done * places, tokens, 0, bytes_in, bytes_out, 1e-9 * self.state.nanoseconds)

    def serve(self, lane: Lane, going_on: Callable[[], bool], counts: ServerCounts) -> None:
        """Answer and count the calls that come through the lane, until all are answered, something else comes, or `going_on` says no."""
        with counts.live(NATIVE, self.counted), lane.handed_over(self.state) as base:
            arguments = ctypes.byref(self.step), base, ctypes.byref(self.state), int(_LOOK_SECONDS * 1e9), torch.get_num_threads()
            while library().cloven_step_serve(*arguments) == _NOT_YET:
                if not going_on():
                    return

    def cancel(self) -> None:
        """Answer no more calls; from another thread."""
        self.state.cancelled = 1

    def compute(self, layer: int, key: bool, x: Tensor, width: int) -> Tensor:
        """One call by itself, for tests: x [B, S, W] -> [B, S, width]."""
        return _computed(self.step, layer, key, x, width)


class StepTemplate:
    """What all passes in one dtype have in common: the layers without keys.

    Args:
        layers: the enclave's.
        noise: ρ.
    """

    def __init__(self, layers: Sequence[LayerOfStep], noise: int, dtype: torch.dtype) -> None:
        self._held: list[Tensor] = []
        self._dtype = dtype
        self._shapes = [layer.shape for layer in layers]
        self.calls = calls_of(self._shapes, noise)
        self._widths = list(itertools.accumulate((_widths(self._shapes[at], noise, key) for at, key in self.calls), _sum, initial=(0, 0)))
        self._layers = [self._layer(layer, noise) for layer in layers]

    def _layer(self, layer: LayerOfStep, noise: int) -> _CLayer:
        shape, gather = layer.shape, layer.gather
        made = _CLayer(shape.heads, shape.kv_heads, shape.head_dim, noise, int(bool(noise or shape.rotary)))
        if gather is not None:
            made.period = len(gather.partner)
            made.partner, made.cosine, made.sine = (self._at(part.int()) for part in (gather.partner, gather.cosine, gather.sine))
        if layer.norms is not None and shape.norm_epsilon is not None:
            made.norms, made.epsilon = self._at(layer.norms.to(self._dtype).float()), shape.norm_epsilon
        if layer.restore is not None:
            made.restore = self._at(layer.restore.int())
        return made

    def _at(self, tensor: Tensor) -> int:
        self._held.append(tensor.contiguous())
        return self._held[-1].data_ptr()

    def step(
        self,
        name: bytes,
        first: int,
        places: torch.Size,
        tables: tuple[Tensor, Tensor] | None,
        keys: Sequence[tuple[Tensor, Tensor]],
        noise: Sequence[Tensor],
    ) -> EnclaveStep:
        """A pass over `places` = [B, S] rows.

        Args:
            tables: cos and ± sin for their positions, rounded to the dtype of the template, in float32; contiguous.
            keys: kv and inverse of every layer's `SessionKeys`; none in permute mode.
            noise: ν for every layer [B, 2, G, S, ρ]; none in permute mode.
        """
        layers = (_CLayer * len(self._layers))(*self._layers)
        for made, (kv, inverse), random in zip(layers, keys, noise, strict=False):
            made.kv, made.inverse, made.random = kv.data_ptr(), inverse.data_ptr(), random.data_ptr()
        size = self._dtype.itemsize * places.numel()
        sizes = [(size * taken, size * given) for taken, given in self._widths]
        held = (self, layers, tables, keys, noise)
        return EnclaveStep(name, first, places[1], self._step(places, tables, layers), self.calls, sizes, held)

    def compute(
        self, layer: int, key: bool, x: Tensor, tables: tuple[Tensor, Tensor] | None, keys: SessionKeys | None, random: Tensor | None
    ) -> Tensor:
        """One call of any number of rows, by itself, on PyTorch's number of threads.

        Args:
            x: q ‖ k (‖ v), or a' [B, S, W].
            tables, random: as for `step`, of this layer; for a call that keys.
            keys: of every sequence; None in permute mode.

        Raises:
            ValueError: sizes that do not go together.
        """
        made, shape = _CLayer.from_buffer_copy(self._layers[layer]), self._shapes[layer]
        size = shape.head_dim + made.noise
        heads = shape.heads + (shape.kv_heads * (2 if made.noise else 1) if key else 0)
        square = (x.shape[0], 2, shape.kv_heads, size, size)
        if (
            x.shape[2] != heads * (shape.head_dim if key else size)
            or (key and made.period and (tables is None or any(part.shape[:2] != x.shape[:2] for part in tables)))
            or (made.noise and (keys is None or keys.kv.shape != square or keys.inverse.shape != square))
            or (key and made.noise and (random is None or random.shape != (*square[:3], x.shape[1], made.noise)))
        ):
            raise ValueError("rows, tables, keys or noise of other sizes than the layer's")
        if keys is not None:
            made.kv, made.inverse = keys.kv.data_ptr(), keys.inverse.data_ptr()
        if random is not None:
            made.random = random.data_ptr()
        layers = (_CLayer * 1)(made)
        step = self._step(x.shape[:2], tables, layers)
        return _computed(step, 0, key, x, heads * (size if key else shape.head_dim), torch.get_num_threads())

    def _step(self, places: torch.Size, tables: tuple[Tensor, Tensor] | None, layers: Any) -> _CStep:
        step = _CStep(int(self._dtype == torch.bfloat16), places[0], places[1], len(layers))
        step.layer = ctypes.addressof(layers)
        if tables is not None:
            step.cos, step.sin = (part.data_ptr() for part in tables)
            step.cos_width, step.sin_width = (part.shape[-1] for part in tables)
        return step


def _widths(shape: AttentionShape, noise: int, key: bool) -> tuple[int, int]:
    """Widths of the rows that a call takes and gives."""
    plain, keyed = shape.widths(), shape.widths(noise)
    if not key:
        return keyed[0], plain[0]
    parts = 3 if noise else 2
    return sum(plain[:parts]), sum(keyed[:parts])


def _sum(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def _computed(step: _CStep, layer: int, key: bool, x: Tensor, width: int, threads: int = 1) -> Tensor:
    x = x.contiguous()
    out = torch.empty(*x.shape[:2], width, dtype=x.dtype)
    library().cloven_step_compute(ctypes.byref(step), layer, int(key), x.data_ptr(), out.data_ptr(), threads)
    return out
