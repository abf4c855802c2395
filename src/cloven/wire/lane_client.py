"""A channel's end of its lane, where it has one: joined, waited at, and left when anything goes wrong. Used under the channel's lock."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from cloven.wire.lane import CAPACITY, PREFIX_BYTES, Frame, Lane, LaneGone, fits, lanes_available, short_path

_JOIN_SECONDS = 5.0  # that a server may take to pass a lane
_LOOK_SECONDS = 0.1  # how often, while a lane is silent, its other end is looked at
_T = TypeVar("_T")


class LaneClient:
    """See the module.

    Args:
        folder: where the server makes the sockets over which it passes lanes; None: none can be had.
        awake: seconds to look for the answer to a call without a header without sleeping.

    `wanted` says that a new lane is to be asked for: the last one was left, or the connection is back.
    """

    def __init__(self, folder: Path | None, awake: float = 0.0) -> None:
        self._folder, self._awake = folder, awake
        self._lane: Lane | None = None
        self.wanted = False

    @property
    def possible(self) -> bool:
        """Whether it is worth asking for one."""
        return self._folder is not None and lanes_available()

    @property
    def generation(self) -> int:
        """Changes with every message that has a header, and is never the same in two lanes; −1: there is no lane."""
        lane = self._lane  # read once: another thread may leave it
        return lane.generation if lane is not None else -1

    def carries(self, frames: list[Frame], expected: int | None) -> bool:
        """Whether these frames, and an answer of at most `expected` payload bytes, go through a lane."""
        return self._lane is not None and fits(frames, expected)

    def fits_raw(self, size: int, expected: int) -> bool:
        """Whether there is a lane for a call without a header, of `size` bytes and eight more, and an answer of `expected` bytes."""
        return self._lane is not None and size + PREFIX_BYTES <= CAPACITY and expected <= CAPACITY

    def take(self, segment: str) -> None:
        """Take the lane that the server has named; "": it has none.

        Raises:
            LaneGone, OSError: it was not to be had.
        """
        self.leave()
        if not segment or self._folder is None:
            return
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_JOIN_SECONDS)
            with short_path(self._folder, segment) as path:
                connection.connect(path)
            self._lane = Lane.taken(connection)
        except BaseException:
            connection.close()
            raise

    def leave(self) -> None:
        """Close the lane, if there is one."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    @contextlib.contextmanager
    def using(self) -> Iterator[Lane]:
        """The lane, for one exchange. Whatever is raised meanwhile, it is left: an answer still to come must find nobody."""
        assert self._lane is not None
        try:
            yield self._lane
        except BaseException as error:
            self.leave()
            self.wanted = not isinstance(error, LaneGone)  # where the other side has ended, its return is waited for
            raise

    def answer(self, lane: Lane, deadline: float) -> list[Any] | None:
        """The frames of the answer; None: the time is up.

        Raises:
            LaneGone: the other side has ended, or talks nonsense.
        """
        return self._patient(lane, deadline, lane.receive)

    def raw(self, lane: Lane, x: Tensor, out: Tensor, deadline: float) -> bool:
        """A call without a header: dense x goes, dense out gets the answer; whether it came in time.

        Raises:
            LaneGone: as above.
        """
        came = lane.raw(x.data_ptr(), x.nbytes, out.data_ptr(), out.nbytes, _look_until(deadline), self._awake, again=False)
        return came or self._came(lane, out, deadline)

    def asked(self, prefix: int, x: Tensor, out: Tensor, meanwhile: Callable[[], None], deadline: float) -> bool:
        """The same in two halves, with a prefix: `meanwhile` runs between them. The lane is left as by `using`, and when nothing came.

        Raises:
            LaneGone: as above.
        """
        lane = self._lane
        assert lane is not None
        came = gone = False
        try:
            lane.ask(prefix, x.data_ptr(), x.nbytes)
            meanwhile()
            came = lane.raw(0, 0, out.data_ptr(), out.nbytes, _look_until(deadline), self._awake, again=True)
            came = came or self._came(lane, out, deadline)
        except LaneGone:
            gone = True
            raise
        finally:
            if not came:
                self.leave()
                self.wanted = not gone
        return came

    def _came(self, lane: Lane, out: Tensor, deadline: float) -> bool:
        """Whether the answer to a call that was sent comes in time, though not at once."""

        def look(seconds: float) -> bool | None:
            return lane.raw(0, 0, out.data_ptr(), out.nbytes, seconds, 0.0, again=True) or None

        return self._patient(lane, deadline, look) is not None

    def _patient(self, lane: Lane, deadline: float, look: Callable[[float], _T | None]) -> _T | None:
        while True:
            left = deadline - time.monotonic()
            found = look(min(left, _LOOK_SECONDS))  # once even when the time is up: it may have come meanwhile
            if found is not None or left <= 0:
                return found
            if lane.other_is_gone():
                raise LaneGone("the other side has ended")


def _look_until(deadline: float) -> float:
    """Seconds for the first look."""
    return min(deadline - time.monotonic(), _LOOK_SECONDS)
