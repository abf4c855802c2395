"""Whose turn it is: first come, first served, and a bounded number of those who wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from cloven.serving.api_error import ApiError, stopping, too_many


class Turns:
    """So many at once, so many waiting, in the order in which they came. For one event loop.

    Args:
        running: turns at once.
        waiting: requests that may wait for one.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._free, self._most_waiting = running, waiting
        self._queue: deque[asyncio.Future[None]] = deque()
        self._stopped: Callable[[], ApiError] | None = None

    @property
    def free(self) -> int:
        """Turns that could be taken at once."""
        return 0 if self._queue else self._free

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def take(self) -> None:
        """Wait for a turn; every turn that was taken must be given back.

        Raises:
            ApiError: too many wait already, or the server is stopping.
        """
        if self._stopped is not None:
            raise self._stopped()
        if self._free and not self._queue:
            self._free -= 1
            return
        if len(self._queue) >= self._most_waiting:
            raise too_many(len(self._queue))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back()  # it had just been handed over
            elif turn in self._queue:
                self._queue.remove(turn)
            raise

    def give_back(self) -> None:
        """The next one may run."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def stop(self, why: Callable[[], ApiError] = stopping) -> None:
        """Nobody waits any longer: they are told why."""
        self._stopped = why
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_exception(why())
