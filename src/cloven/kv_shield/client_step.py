"""A pass of the model, as the accelerator's process sees it: one request, then calls without headers.

    step  -> stepped        whose cache, which place, which positions: once
    q ‖ k (‖ v), a', …      every layer's rows, in order, through the lane that the request took; answers alike

Whatever is not the next call of the pass, or finds the lane gone or used for something else, is done call by call instead: see `session`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cloven.errors import WorkerRefused
from cloven.kv_shield.messages import NAMES, STEP_DTYPES, Step, Stepped, frame_of
from cloven.kv_shield.shapes import AttentionShape, calls_of, fits_step
from cloven.wire.channel import Channel
from cloven.wire.schema import Hello, Welcome


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


class ClientSteps:
    """The passes of a session, each thread's its own.

    Args:
        channel: to the enclave.
        layers, noise: of the bundle; ρ is 0 in permute mode.
    """

    def __init__(self, channel: Channel, layers: Sequence[AttentionShape], noise: int) -> None:
        self._channel, self._layers, self._noise = channel, layers, noise
        self._calls = calls_of(layers, noise)
        self._served = True  # until the enclave says that it cannot
        self._of_thread = threading.local()

    def forget(self) -> None:
        """A new call of the model: what was left of the last pass is over."""
        self._of_thread.step = None

    def call(
        self, name: str, layer: int, key: bool, rows: Tensor, width: int, place: Callable[[], tuple[bytes, int, Tensor]]
    ) -> Tensor | None:
        """The answer of a call that is part of a pass; None where it has to be asked for by itself.

        Args:
            place: the session, the first place and the positions of a pass that begins with this call.
        """
        if (layer, key) == self._calls[0]:
            self._of_thread.step = self._begun(rows, place)
        step: ClientStep | None = getattr(self._of_thread, "step", None)
        return step.call(name, layer, key, rows, width) if step is not None else None

    def end(self) -> None:
        """End a pass that was interrupted, or whose end the enclave has not noticed yet: nothing is sealed during one."""
        if self._channel.lane_generation >= 0:
            request = Hello(self._channel.next_id(), self._channel.bundle)
            self._channel.exchange("hello", request, [], lambda m, _: m if isinstance(m, Welcome) else None, expected=0)

    def _begun(self, rows: Tensor, place: Callable[[], tuple[bytes, int, Tensor]]) -> ClientStep | None:
        """Ask for a pass over all layers; None where it cannot be had."""
        places = rows.shape[:2]
        if not self._served or rows.dtype not in STEP_DTYPES or self._channel.lane_generation < 0:
            return None
        if not fits_step(self._layers, self._noise, places.numel(), rows.element_size()):
            return None
        session, first, positions = place()
        if self._noise and bool((positions < 0).any()):
            return None
        request = Step(self._channel.next_id(), self._channel.bundle, session, places[0], places[1], first, NAMES[rows.dtype])
        generation: list[int] = []  # read before another thread can use the lane
        try:
            calls = self._channel.exchange(
                "step",
                request,
                [frame_of(positions)],
                lambda m, _: m.calls if isinstance(m, Stepped) else None,
                lambda: generation.append(self._channel.lane_generation),
                expected=0,
            )
        except WorkerRefused:  # the single calls are refused too, and say why; or they are not
            return None
        if calls == 0 and self._channel.lane_generation == generation[0]:  # else the lane was lost, and the socket cannot
            self._served = False
        return ClientStep(self._channel, generation[0], self._calls, places, rows.dtype) if calls == len(self._calls) else None
