"""A KV-Shield session on the accelerator's side: which positions a call is about, which cache it fills, and the exchanges.

The base model's call tells positions and pads: they are read from its arguments and from those of its rotary embedding. In session mode
every cache (transformers' `Cache` object) has its own session in the enclave, opened when its first row is keyed and closed when the
object is gone; a call without a cache gets one for itself, closed when its thread calls again or ends.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cloven.errors import BadBundle, BadInput, ClovenError, RunError, WorkerRefused
from cloven.kv_shield.client_step import ClientSteps
from cloven.kv_shield.layer import KeyedAttention
from cloven.kv_shield.manifest import EXPOSED, KvManifest
from cloven.kv_shield.messages import (
    DTYPES,
    ENCLAVE,
    NAMES,
    NO_SESSION,
    Close,
    Closed,
    Key,
    Keyed,
    Label,
    Open,
    Opened,
    Restore,
    Restored,
    Seal,
    Sealed,
    SealEnd,
    SealEnded,
    Unseal,
    Unsealed,
    frame_of,
    tensor_of,
)
from cloven.kv_shield.sealed_cache import SealedCache, resume, seal
from cloven.model.attention import rotary_module
from cloven.model.runtime import CLOSED, RuntimeOptions, Session, open_channel
from cloven.telemetry import Telemetry
from cloven.wire.channel import Channel
from cloven.wire.limits import MAX_PAYLOAD_BYTES

_MOVES_ROWS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


class _Alone:
    """The session of a call without a cache: held by the thread alone, so that it is gone when the thread is."""

    def __init__(self, name: bytes) -> None:
        self.name = name


class _Call(threading.local):
    """What a thread's current call of the base model is about."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None  # as given to the rotary embedding
        self.known: Tensor | None = None  # as sent to the enclave
        self.alone: _Alone | None = None


class _Hook:
    """A session's hook on its model. A copy of the model starts without a session: the hook's copy does nothing."""

    def __init__(self, act: Callable[..., None] | None) -> None:
        self._act = act

    def __call__(self, *arguments: Any) -> None:
        if self._act is not None:
            self._act(*arguments)

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Hook:
        return _Hook(None)


class KvSession(Session):
    """A model's connection to its enclave: see `Session`.

    Guarantee: what the cache holds is keyed. Not hidden from this process: hidden states, and q, k, v until they are keyed.
    """

    channel: Channel

    def __init__(self, model: Any, channel: Channel, telemetry: Telemetry, manifest: KvManifest) -> None:
        super().__init__(model, channel, telemetry)
        self._layers = manifest.layers
        self._noise = manifest.config.noise_dims if manifest.config.mode == "session" else 0
        self._of_cache: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
        self._sealed: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sealing = threading.Lock()
        self._steps = ClientSteps(channel, self._layers, self._noise)
        self._alone: set[bytes] = set()  # of calls without a cache, of all threads
        self._gone: list[bytes] = []  # of caches and threads that no longer exist: closed at the next call
        self._call = _Call()
        self.on_close(model.base_model.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True).remove)
        rotary = rotary_module(model)
        if rotary is not None:
            self.on_close(rotary.register_forward_pre_hook(_Hook(self._rotate), with_kwargs=True).remove)

    def _enter(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._noise and not isinstance(kwargs.get("cache"), Cache | None):
            raise BadInput("a shared paged cache (continuous batching) is one key domain: prepare the model with --mode permute for it")
        mask = kwargs.get("attention_mask")
        if self._noise and isinstance(mask, Tensor) and mask.dim() != 2:
            raise BadInput("session mode needs a mask [batch, length], to know which rows are pads")
        if self._noise and isinstance(mask, dict):
            raise BadInput("session mode needs a mask [batch, length]: this cache (a static one) makes its own; use a dynamic cache")
        self._call.mask = mask if isinstance(mask, Tensor) else None
        self._call.positions = self._call.known = None
        self._call.alone = None  # the last call's, which ends by that
        self._steps.forget()

    def _rotate(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call.positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        self._call.known = None  # a layer may be called by itself, with positions of its own

    def close(self, reason: str = CLOSED) -> None:
        """End the session; the enclave drops its keys, if it can be reached within a second."""
        if not self.closed and reason == CLOSED:
            self.channel.timeout = min(self.channel.timeout, 1.0)
            with contextlib.suppress(ClovenError):
                for name in {*self._of_cache.values(), *self._alone, *self._gone}:
                    self._end(name)
        super().close(reason)

    def key(self, layer: int, x: Tensor, cache: Any) -> Tensor:
        """See `kv_shield.layer.Peer`."""
        return self.guarded(lambda: self._key(layer, x, cache))

    def restore(self, layer: int, a: Tensor, cache: Any) -> Tensor:
        """See `kv_shield.layer.Peer`."""
        return self.guarded(lambda: self._restore(layer, a, cache))

    def seal(self, cache: Any) -> SealedCache:
        """Encrypt an idle cache and overwrite its memory; see `cloven.kv_shield.sealed_cache`.

        Args:
            cache: a transformers `Cache` that this model has filled; a `PreallocatedCache` leaves no copies behind.

        Raises:
            BadInput: there is nothing in it, or it is sealed already.
            WorkerRefused: the bundle was prepared without --seal-idle.
            RunError: the connection was lost on the way; the cache is as it was, and can be sealed again.
        """
        if cache in self._sealed or not cache.get_seq_length():
            raise BadInput("this cache is sealed already, or empty")
        with self._sealing:
            name = self.guarded(lambda: self._session_for(cache, 1))
            self._steps.end()
            sealed = seal(_Sealer(self, name), cache)
            self._sealed.add(cache)
            return sealed

    def resume(self, sealed: SealedCache) -> Any:
        """Decrypt a sealed cache; returns the cache, ready for `generate`.

        Raises:
            WorkerRefused: a block was changed, swapped, left out, or is of an earlier sealing. The cache stays sealed.
        """
        with self._sealing:
            cache = resume(_Sealer(self, self._session_for(sealed.cache, 1)), sealed)
            self._sealed.discard(cache)
            return cache

    def _key(self, layer: int, x: Tensor, cache: Any) -> Tensor:
        first = int(cache.get_seq_length(layer)) if self._noise and cache is not None else 0
        rows, positions = _on_cpu(x), self._positions_once(x, first)
        name = self._session_for(cache, x.shape[0]) if self._noise else NO_SESSION
        width = sum(self._layers[layer].widths(self._noise)[: 3 if self._noise else 2])
        keyed = self._steps.call(self._layers[layer].name, layer, True, rows, width, lambda: (name, first, positions))
        if keyed is not None:
            return keyed.to(x.device)
        parts = []
        for start, end in _pieces(rows, max(rows.shape[-1], width)):
            shape = (rows.shape[0], end - start, width)
            request = Key(self.channel.next_id(), self.channel.bundle, name, layer, *shape[:2], first + start, NAMES[rows.dtype])
            frame = [frame_of(positions[:, start:end]), frame_of(rows[:, start:end])]
            parts.append(self._answered(self._layers[layer].name, request, frame, Keyed, shape, rows.dtype))
        return _joined(parts, x.device)

    def _restore(self, layer: int, a: Tensor, cache: Any) -> Tensor:
        rows = _on_cpu(a)
        name = self._session_for(cache, a.shape[0]) if self._noise else NO_SESSION
        where = self._layers[layer]
        restored = self._steps.call(
            f"{where.name}.{where.output}", layer, False, rows, where.widths()[0], lambda: (name, 0, self._positions_once(rows, 0))
        )
        if restored is not None:
            return restored.to(a.device)
        parts = []
        for start, end in _pieces(rows, rows.shape[-1]):
            shape = (rows.shape[0], end - start, where.widths()[0])
            request = Restore(self.channel.next_id(), self.channel.bundle, name, layer, *shape[:2], NAMES[rows.dtype])
            frame = [frame_of(rows[:, start:end])]
            parts.append(self._answered(f"{where.name}.{where.output}", request, frame, Restored, shape, rows.dtype))
        return _joined(parts, a.device)

    def _answered(
        self,
        layer: str,
        request: Key | Restore,
        frame: list[memoryview],
        kind: type[Keyed | Restored],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """One exchange of rows: the answer, of `kind`, as a tensor of `shape`."""

        def parse(message: Any, payload: memoryview | None) -> Tensor | None:
            if payload is None or not isinstance(message, kind) or (message.batch, message.rows) != shape[:2]:
                return None
            return tensor_of(payload, shape, dtype)

        return self.channel.exchange(layer, request, [*frame], parse, expected=math.prod(shape) * dtype.itemsize)

    def require_open(self, cache: Any) -> None:
        """See `kv_shield.layer.Peer`."""
        if cache is not None and cache in self._sealed:
            raise RunError("this cache is sealed: resume it first")

    def _positions_once(self, x: Tensor, first: int) -> Tensor:
        """The positions are the same for every layer of a call, and so is `first`: each layer asks before its own cache grows."""
        known = self._call.known
        if known is None or known.shape != x.shape[:2]:
            known = self._call.known = self._positions(x, first)
        return known

    def _positions(self, x: Tensor, first: int) -> Tensor:
        """int32 [B, S]: the positions of the rows that follow `first` others in the cache; −1 at pads, in session mode."""
        batch, length = x.shape[:2]
        given = self._call.positions
        positions = torch.zeros(batch, length, dtype=torch.int32)
        if given is not None:
            if given.shape[-1] != length or given.shape[0] not in (1, batch):
                raise RunError("the positions of this call are not those of its rows")
            positions.copy_(given.expand(batch, length))
        mask = self._call.mask
        if self._noise and mask is not None:
            if mask.shape[1] < first + length:
                raise BadInput(f"a mask of {mask.shape[1]} rows: the cache has {first} and the call {length} more, all need their column")
            positions[mask[:, first : first + length].cpu() == 0] = -1  # by place: the mask may be longer than the text
        return positions

    def _session_for(self, cache: Any, sequences: int) -> bytes:
        with contextlib.suppress(IndexError):  # none left: another thread may take the last one
            while True:
                self._end(self._gone.pop())
        alone = self._call.alone
        name: bytes | None = self._of_cache.get(cache) if cache is not None else alone.name if alone is not None else None
        if name is None:
            request = Open(self.channel.next_id(), self.channel.bundle, sequences)
            name = self.channel.exchange("open", request, [], lambda m, _: m.session if isinstance(m, Opened) else None)
            if cache is not None:
                self._of_cache[cache] = name
                weakref.finalize(cache, self._gone.append, name)
                if self._noise:
                    for method in _MOVES_ROWS:
                        setattr(cache, method, _refuse_to_move)
            else:
                alone = self._call.alone = _Alone(name)
                self._alone.add(name)
                weakref.finalize(alone, self._gone.append, name)
        return name

    def _end(self, name: bytes) -> None:
        self._alone.discard(name)
        request = Close(self.channel.next_id(), self.channel.bundle, name)
        with contextlib.suppress(WorkerRefused):  # the enclave has forgotten it already: restarted, or idle for long
            self.channel.exchange("close", request, [], lambda m, _: True if isinstance(m, Closed) else None)


def _refuse_to_move(*_: Any, **__: Any) -> None:
    raise BadInput("session mode has keys for every row of the batch, which therefore stay where they are: no beam search")


class _Sealer:
    """One cache's session in the enclave, for `sealed_cache`."""

    def __init__(self, session: KvSession, name: bytes) -> None:
        self._channel, self._name = session.channel, name

    def seal_block(self, label: Label, data: memoryview) -> tuple[bytes, int]:
        """See `Sealer`."""
        request = Seal(self._channel.next_id(), self._channel.bundle, self._name, **_fields(label))
        return self._channel.exchange("seal", request, [data], lambda m, p: (bytes(p), m.epoch) if isinstance(m, Sealed) and p else None)

    def end_seal(self, blocks: int) -> int:
        """See `Sealer`."""
        request = SealEnd(self._channel.next_id(), self._channel.bundle, self._name, blocks)
        return self._channel.exchange("seal", request, [], lambda m, _: m.epoch if isinstance(m, SealEnded) else None)

    def unseal_block(self, label: Label, epoch: int, data: memoryview) -> tuple[memoryview, int]:
        """See `Sealer`."""
        request = Unseal(self._channel.next_id(), self._channel.bundle, self._name, epoch, **_fields(label))
        return self._channel.exchange("unseal", request, [data], lambda m, p: (p, m.left) if isinstance(m, Unsealed) and p else None)


def _fields(label: Label) -> dict[str, Any]:
    return {**vars(label), "shape": list(label.shape)}


def _on_cpu(x: Tensor) -> Tensor:
    if x.dtype not in NAMES:
        raise BadInput(f"KV-Shield computes in {', '.join(DTYPES)}, not {x.dtype}")
    return x.detach().cpu()


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).to(device)


def _pieces(rows: Tensor, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit in one exchange each."""
    step = max(1, (MAX_PAYLOAD_BYTES - 4 * rows.shape[0] * rows.shape[1]) // (rows.shape[0] * width * rows.element_size()))
    for start in range(0, rows.shape[1], step):
        yield start, min(start + step, rows.shape[1])


def open_session(model: Any, options: RuntimeOptions) -> KvSession:
    """Connect a loaded model to its enclave.

    Raises:
        BadBundle: the model was not loaded from OUT/exposed.
        ForeignBundle, PeerRefused, WorkerUnreachable, WorkerTimeout: the enclave.
    """
    if options.constant_rows:
        raise BadInput("constant_rows pads exchanges with a SLIP worker: the enclave's answers are keyed row by row")
    folder, attentions = getattr(model, "cloven_folder", None), getattr(model, "cloven_attentions", None)
    if not isinstance(folder, Path) or not isinstance(attentions, list):
        raise BadBundle("this model was not loaded from OUT/exposed of a KV-Shield bundle")
    manifest = KvManifest.read(folder, EXPOSED)
    telemetry = Telemetry()
    channel = open_channel(options, manifest.bundle, telemetry, schema=ENCLAVE, peer="enclave")
    try:
        channel.hello()
        telemetry.reset()
        session = KvSession(model, channel, telemetry, manifest)
    except BaseException:
        channel.close()
        raise
    for attention in attentions:
        assert isinstance(attention, KeyedAttention)
        attention.peer = session
    return session
