"""One computation for the linears of a group: whichever is called first computes for all, its siblings take their part."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor


class SharedInput:
    """Recognises siblings by the identity of their input.

    Args:
        compute: x [..., K] -> the outputs of all members, in order.

    The last input is held until every sibling has taken its part: an id would be reused otherwise. Each thread has its own, so that
    one model can serve several. An input changed in place between two siblings is not noticed; no supported family does that.
    """

    def __init__(self, compute: Callable[[Tensor], list[Tensor]]) -> None:
        self._compute = compute
        self._local = threading.local()

    def output(self, member: int, x: Tensor) -> Tensor:
        """The output of one member for x."""
        waiting: dict[int, Tensor] = getattr(self._local, "outputs", {})
        if getattr(self._local, "x", None) is not x or member not in waiting:
            self._local.x, self._local.outputs = None, {}
            waiting = dict(enumerate(self._compute(x)))
        y = waiting.pop(member)
        self._local.x, self._local.outputs = (x, waiting) if waiting else (None, {})
        return y
