"""Pads that wait: made in batches ahead of need, handed out in order, each once.

A pad is a mask m and its image u, with which W x_int follows from z = W (x_int + m):

    mask:    c = x_int + m            unmask:  W x_int = z − u

Where they come from is a subclass's matter: uniform from AES-CTR (`one_time`), or LWE samples (`lwe`). Reuse is impossible by
construction: what leaves the queue never returns to it, a `Pads` object masks once and unmasks once, and a forked child's waiting pads are
dropped.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from cloven.errors import PadMisuse
from cloven.field.residues import add, subtract

_SINGLES = 64  # rows that are cut apart at a time


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
        return add(x_int, self.masks(x_int.shape))

    def masks(self, shape: torch.Size) -> Tensor:
        """m, for a kernel that adds it to rows of this shape [M, K]. Once."""
        mask, self._mask = self._mask, None
        if mask is None or os.getpid() != self._pid:
            raise PadMisuse("a pad masks once, in the process that made it")
        if shape != mask.shape:  # broadcasting would put several rows under one pad
            raise PadMisuse(f"pads of shape {tuple(mask.shape)} cannot mask rows of shape {tuple(shape)}")
        return mask

    def unmask(self, z: Tensor) -> Tensor:
        """W x_int = z − u mod p: residues int32 [M, N] -> residues int32 [M, N]. Once, after masking."""
        return subtract(z, self.images(z.shape))

    def images(self, shape: torch.Size) -> Tensor:
        """u, for a kernel that subtracts it from answers of this shape [M, N]. Once, after masking."""
        image, self._image = self._image, None
        if image is None or self._mask is not None or os.getpid() != self._pid:
            raise PadMisuse("a pad unmasks once, after it has masked, in the process that made it")
        if shape != image.shape:
            raise PadMisuse(f"pads of shape {tuple(image.shape)} cannot unmask rows of shape {tuple(shape)}")
        return image


class MaskSource(Protocol):
    """Where masks come from: `take` hands out pads for some rows, none of them ever again."""

    def take(self, rows: int) -> Pads:
        """Pads for `rows` rows; waits or raises when there are none, and never repeats one."""


class WaitingPads(ABC):
    """A queue of pads; a subclass makes them, in `_make`.

    `made` and `seconds` count the rows made so far and the time that took.
    """

    def __init__(self) -> None:
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
                    parts.append(self._batch(missing))
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
            batch = self._batch(missing)
            with self._lock:
                self._ready.append(batch)
                self._count += missing
            return missing

    def fresh(self, rows: int) -> tuple[Tensor, Tensor]:
        """Masks [rows, K] and images [rows, N] made now, past the queue, for another source to hand out."""
        _, mask, image = self._batch(rows)
        return mask, image

    def forget(self) -> None:
        """Drop every pad that is ready: the session ends."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._ready.clear()
        self._count = 0

    def _pop(self, rows: int) -> list[tuple[int, Tensor, Tensor]]:
        if rows == 1 and self._ready and self._ready[0][1].shape[0] > 1:
            self._cut_singles()
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

    def _cut_singles(self) -> None:
        """Cut the next rows apart, many at once: one by one it costs PyTorch four views each."""
        first, mask, image = self._ready.popleft()
        if mask.shape[0] > _SINGLES:
            self._ready.appendleft((first + _SINGLES, mask[_SINGLES:], image[_SINGLES:]))
            mask, image = mask[:_SINGLES], image[:_SINGLES]
        singles = zip(range(first, first + mask.shape[0]), mask.split(1), image.split(1), strict=True)
        self._ready.extendleft(reversed(list(singles)))

    @torch.no_grad()
    def _batch(self, rows: int) -> tuple[int, Tensor, Tensor]:
        with self._lock:
            first = self._next
            self._next += rows
        started = time.perf_counter()
        mask, image = self._make(first, rows)
        self.made += rows
        self.seconds += time.perf_counter() - started
        return first, mask, image

    @abstractmethod
    def _make(self, first: int, rows: int) -> tuple[Tensor, Tensor]:
        """Pads first … first + rows − 1, which nobody asks for again: masks int32 [rows, K], images int32 [rows, N]."""


_live_sources: weakref.WeakSet[WaitingPads] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for source in list(_live_sources):
        source._drop()  # without the lock: a thread that is not here may hold it for ever


os.register_at_fork(after_in_child=_forget_after_fork)
