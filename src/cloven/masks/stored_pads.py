"""The pads of one group from a store: read ahead, checked, handed out in order, each once."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from cloven.errors import SessionClosed, StoreEmpty
from cloven.field.freivalds import Freivalds
from cloven.masks.pad_store import PadStore
from cloven.masks.waiting import WaitingPads
from cloven.telemetry import logger

_POLL_SECONDS = 0.2


class StoredPads(WaitingPads):
    """See the module.

    Args:
        store, group: where the pads are.
        freivalds: checks every pad that is read, with the store's own secret.
        name: what to call the group in errors.
        on_empty: what to do when the store has run dry: "fail"; "wait" until somebody fills it; "compute": take `spare`.
        spare: fresh pads that are not in the store: masks int32 [rows, K], images int32 [rows, N].
        ended: whether the session has ended, so that nobody waits any more.
    """

    def __init__(
        self,
        store: PadStore,
        group: int,
        freivalds: Freivalds,
        name: str,
        on_empty: str,
        spare: Callable[[int], tuple[Tensor, Tensor]] | None,
        ended: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._store, self._group, self._freivalds, self._name = store, group, freivalds, name
        self._on_empty, self._spare, self._ended = on_empty, spare, ended

    def fill(self, rows: int) -> int:
        """Read ahead what there is; an empty store is a matter for whoever needs a pad now."""
        try:
            return super().fill(min(rows, self.ready + self._store.left(self._group)))
        except StoreEmpty:
            return 0

    def _make(self, first: int, rows: int) -> tuple[Tensor, Tensor]:
        del first  # the store has its own indices
        told = False
        while True:
            try:
                _, mask, image = self._store.take(self._group, rows)
                break
            except StoreEmpty:
                if self._on_empty == "compute" and self._spare is not None:
                    return self._spare(rows)
                if self._on_empty != "wait":
                    raise
                if not told:
                    logger.warning("%s: waiting until somebody fills the pad store %s", self._name, self._store.folder)
                    told = True
                if self._ended():
                    raise SessionClosed("the session has ended while it waited for pads") from None
                time.sleep(_POLL_SECONDS)
        self._freivalds.check(mask, image, f"a stored pad for {self._name}")
        return mask, image
