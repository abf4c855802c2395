"""One-time pads: m uniform in F_p^K, its image u = W m made ahead of need, each used once.

    mask:    c = x_int + m            unmask:  W x_int = z − u

m comes from AES-256-CTR under a key drawn from the operating system when the process starts a session; u is computed by the trusted
side from its own copy of W, in batches, where the product is compute-bound and several times cheaper per row than the worker's. It
costs as many multiplications as the offloaded product: the work leaves the critical path, it does not disappear. Every image is
checked, S u = (S W) m, before it may be used: a bad kernel, memory or disk would otherwise give wrong tokens silently.

Reuse is impossible by construction: an index is drawn under a lock from a counter that only grows, a `Pads` object masks once and
unmasks once, and a forked child's key and waiting pads are destroyed.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from cloven.errors import PadMisuse
from cloven.field.freivalds import Freivalds
from cloven.field.prg import KEY_BYTES, pad_residues
from cloven.field.products import Backend, PlacedMatrix, multiply
from cloven.field.residues import add, subtract

_LAST_INDEX = 2**63


class Pads:
    """Pads for some rows: masks once, then unmasks once.

    Guarantee: for whoever lacks the key, c is uniform in F_p^{M×K} and independent of x_int. Assumes AES-256 is a PRP. Not hidden:
    the number of rows.
    """

    def __init__(self, first: int, mask: Tensor, image: Tensor, pid: int) -> None:
        self.first = first
        self.rows = mask.shape[0]
        self._mask: Tensor | None = mask
        self._image: Tensor | None = image
        self._pid = pid

    def __repr__(self) -> str:
        return f"Pads(first={self.first}, rows={self.rows}, <secret>)"

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise PadMisuse("pads are neither copied nor pickled: a copy could be used again")

    def mask(self, x_int: Tensor) -> Tensor:
        """c = x_int + m mod p: residues int32 [M, K] -> residues int32 [M, K]. Once."""
        mask, self._mask = self._mask, None
        if mask is None or os.getpid() != self._pid:
            raise PadMisuse("a pad masks once, in the process that made it")
        if x_int.shape != mask.shape:  # broadcasting would put several rows under one pad
            raise PadMisuse(f"pads of shape {tuple(mask.shape)} cannot mask rows of shape {tuple(x_int.shape)}")
        return add(x_int, mask)

    def unmask(self, z: Tensor) -> Tensor:
        """W x_int = z − u mod p: residues int32 [M, N] -> residues int32 [M, N]. Once, after masking."""
        image, self._image = self._image, None
        if image is None or self._mask is not None or os.getpid() != self._pid:
            raise PadMisuse("a pad unmasks once, after it has masked, in the process that made it")
        if z.shape != image.shape:
            raise PadMisuse(f"pads of shape {tuple(image.shape)} cannot unmask rows of shape {tuple(z.shape)}")
        return subtract(z, image)


class MaskSource(Protocol):
    """Where masks come from: `take` hands out pads for some rows, none of them ever again."""

    def take(self, rows: int) -> Pads:
        """Pads for `rows` rows; waits or raises when there are none, and never repeats one."""


class PadKey:
    """A pad key from the operating system, destroyed in forked children."""

    def __init__(self) -> None:
        self._key = bytearray(secrets.token_bytes(KEY_BYTES))
        self._pid = os.getpid()
        _live_keys.add(self)

    def __repr__(self) -> str:
        return "PadKey(<secret>)"

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise PadMisuse("a pad key is neither copied nor pickled")

    def residues(self, group: int, first: int, rows: int, width: int) -> Tensor:
        """The masks of pads first … first + rows − 1."""
        key = bytes(self._key)  # one copy is tested and used: another thread may destroy the key at any moment
        if os.getpid() != self._pid or not any(key):
            raise PadMisuse("the pad key is destroyed: the session has ended, or this process was forked; open a session")
        return pad_residues(key, group, first, rows, width)

    def destroy(self) -> None:
        """Overwrite the key."""
        self._key[:] = bytes(KEY_BYTES)


_live_keys: weakref.WeakSet[PadKey] = weakref.WeakSet()
_live_sources: weakref.WeakSet[OneTimePads] = weakref.WeakSet()


def _destroy_after_fork() -> None:
    for key in list(_live_keys):
        key.destroy()
    for source in list(_live_sources):
        source.forget()


class OneTimePads:
    """The pads of one group: made in batches, handed out in order, each once.

    Args:
        group: the group's number, part of the pads' IV.
        key: the session's pad key; `(key, group)` must belong to this object alone.
        matrix: lends the trusted side's own copy of W [N, K] while a batch is made.
        backend: for the products W m.
        freivalds: checks every batch.
        name: what to call the group in errors.

    `made` and `seconds` count the rows made so far and the time that took.
    """

    def __init__(
        self, group: int, key: PadKey, matrix: Callable[[], PlacedMatrix], backend: Backend, freivalds: Freivalds, name: str
    ) -> None:
        self._group, self._key, self._matrix, self._backend, self._freivalds = group, key, matrix, backend, freivalds
        self._name = name
        self._pid = os.getpid()
        self._ready: deque[tuple[int, Tensor, Tensor]] = deque()
        self._count = 0
        self._next = 0
        self.made = 0
        self.seconds = 0.0
        self._lock = threading.Lock()  # guards the queue and the counter
        self._making = threading.Lock()  # one batch at a time
        _live_sources.add(self)

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise PadMisuse("pads are neither copied nor pickled: a copy could be used again")

    @property
    def ready(self) -> int:
        """Rows that `take` can hand out at once."""
        return self._count

    def take(self, rows: int) -> Pads:
        """Pads for `rows` rows: from the queue, and what is missing made now."""
        if os.getpid() != self._pid:
            raise PadMisuse("this process was forked from the one that holds the pads: open a session of its own")
        with self._lock:
            parts = self._pop(rows)
        missing = rows - sum(mask.shape[0] for _, mask, _ in parts)
        if missing or not parts:
            with self._making:
                with self._lock:  # the background thread may have just made some
                    parts += self._pop(missing)
                missing = rows - sum(mask.shape[0] for _, mask, _ in parts)
                if missing or not parts:
                    parts.append(self._make(missing))
        first, mask, image = parts[0]
        if len(parts) > 1:
            mask, image = torch.cat([mask for _, mask, _ in parts]), torch.cat([image for _, _, image in parts])
        return Pads(first, mask, image, self._pid)

    def fill(self, rows: int) -> int:
        """Make pads until `rows` rows are ready; returns how many were made."""
        with self._making:
            missing = rows - self._count
            if missing <= 0:
                return 0
            batch = self._make(missing)
            with self._lock:
                self._ready.append(batch)
                self._count += missing
            return missing

    def forget(self) -> None:
        """Drop every pad that is ready; after a fork, and when the session ends."""
        self._ready.clear()
        self._count = 0

    def _pop(self, rows: int) -> list[tuple[int, Tensor, Tensor]]:
        parts: list[tuple[int, Tensor, Tensor]] = []
        while rows and self._ready:
            first, mask, image = self._ready.popleft()
            if mask.shape[0] > rows:
                self._ready.appendleft((first + rows, mask[rows:], image[rows:]))
                mask, image = mask[:rows], image[:rows]
            parts.append((first, mask, image))
            rows -= mask.shape[0]
            self._count -= mask.shape[0]
        return parts

    @torch.no_grad()
    def _make(self, rows: int) -> tuple[int, Tensor, Tensor]:
        with self._lock:
            first = self._next
            if first + rows > _LAST_INDEX:
                raise PadMisuse(f"{self._name}: the pad indices of this session are used up")
            self._next += rows
        started = time.perf_counter()
        w = self._matrix()
        mask = self._key.residues(self._group, first, rows, w.columns)
        image = multiply(self._backend, mask, w).cpu()
        self._freivalds.check(mask, image, f"a pad made for {self._name}")
        self.made += rows
        self.seconds += time.perf_counter() - started
        return first, mask, image


os.register_at_fork(after_in_child=_destroy_after_fork)
