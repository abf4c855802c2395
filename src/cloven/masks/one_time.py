"""One-time pads: m uniform in F_p^K, its image u = W m made ahead of need, each used once.

    mask:    c = x_int + m            unmask:  W x_int = z − u

m comes from AES-256-CTR under a key drawn from the operating system when the process starts a session; u is computed by the trusted
side from its own copy of W, in batches, where the product is compute-bound and several times cheaper per row than the worker's. It
costs as many multiplications as the offloaded product: the work leaves the critical path, it does not disappear. Every image is
checked, S u = (S W) m, before it may be used: a bad kernel, memory or disk would otherwise give wrong tokens silently.

Reuse is impossible by construction: an index is drawn under a lock from a counter that only grows, `waiting` hands each pad out once, and a
forked child's key and waiting pads are destroyed.
"""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Callable
from typing import NoReturn

from torch import Tensor

from cloven.errors import PadMisuse
from cloven.field.freivalds import Freivalds
from cloven.field.prg import KEY_BYTES, pad_residues
from cloven.field.products import Backend, PlacedMatrix, multiply
from cloven.masks.waiting import MaskSource as MaskSource
from cloven.masks.waiting import Pads as Pads
from cloven.masks.waiting import WaitingPads

_LAST_INDEX = 2**63


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


def _destroy_after_fork() -> None:
    for key in list(_live_keys):
        key.destroy()


class OneTimePads(WaitingPads):
    """The pads of one group: made in batches, handed out in order, each once.

    Args:
        group: the group's number, part of the pads' IV.
        key: the session's pad key; `(key, group)` must belong to this object alone.
        matrix: lends the trusted side's own copy of W [N, K] while a batch is made.
        backend: for the products W m.
        freivalds: checks every batch.
        name: what to call the group in errors.
    """

    def __init__(
        self, group: int, key: PadKey, matrix: Callable[[], PlacedMatrix], backend: Backend, freivalds: Freivalds, name: str
    ) -> None:
        super().__init__()
        self._group, self._key, self._matrix, self._backend, self._freivalds = group, key, matrix, backend, freivalds
        self._name = name

    def _make(self, first: int, rows: int) -> tuple[Tensor, Tensor]:
        if first + rows > _LAST_INDEX:
            raise PadMisuse(f"{self._name}: the pad indices of this session are used up")
        w = self._matrix()
        mask = self._key.residues(self._group, first, rows, w.columns)
        image = multiply(self._backend, mask, w).cpu()
        self._freivalds.check(mask, image, f"a pad made for {self._name}")
        return mask, image


os.register_at_fork(after_in_child=_destroy_after_fork)
