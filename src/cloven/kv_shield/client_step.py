"""A pass of the model over a few rows, as the accelerator's process sees it: one request, then calls without headers.

    step  -> stepped        whose cache, which place, which positions: once
    q ‖ k (‖ v), a', …      every layer's rows, in order, through the lane that the request took; answers alike

Whatever is not the next call of the pass, or finds the lane gone or used for something else, is done call by call instead: see `session`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cloven.kv_shield.shapes import AttentionShape
from cloven.wire.channel import Channel

MOST_ROWS = 16  # more are better served call by call
DTYPES = (torch.float32, torch.bfloat16)


def calls_of(layers: Sequence[AttentionShape], noise: int) -> list[tuple[int, bool]]:
    """Layer and kind (whether it keys) of every call of a pass, in order."""
    return [(index, key) for index, shape in enumerate(layers) for key in ((True, False) if noise or shape.rotary else (False,))]


class ClientStep:
    """One pass under way.

    Args:
        channel, generation: the lane that has carried the request, when it did.
        calls: see `calls_of`.
        places, dtype: [B, S] of the pass, and the type of its rows.
    """

    def __init__(
        self, channel: Channel, generation: int, calls: Sequence[tuple[int, bool]], places: torch.Size, dtype: torch.dtype
    ) -> None:
        self._channel, self._generation, self._calls, self._places, self._dtype = channel, generation, calls, places, dtype
        self._done = 0

    def call(self, name: str, layer: int, key: bool, x: Tensor, width: int) -> Tensor | None:
        """The answer [B, S, width] for rows x [B, S, W] on the CPU; None where this is not the pass's next call, or it has ended.

        Args:
            name: for statistics and errors.
        """
        if (
            self._done >= len(self._calls)
            or self._calls[self._done] != (layer, key)
            or (x.shape[:2], x.dtype) != (self._places, self._dtype)
        ):
            return None
        x = x.contiguous()
        out = torch.empty(*self._places, width, dtype=x.dtype)
        if not self._channel.raw(name, self._generation, x, out):
            self._done = len(self._calls)
            return None
        self._done += 1
        return out
