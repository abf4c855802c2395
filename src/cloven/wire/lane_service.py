"""The server's side of lanes: one thread for each, which answers as the socket does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from cloven.telemetry import logger
from cloven.wire.lane import Frame, Lane, LaneGone, lanes_available

MOST_LANES = 32
_LOOK_SECONDS = 0.25  # how often a silent lane's other end is looked at
_JOIN_SECONDS = 5.0  # a client that was told of a lane takes its end within that time


class Handover(list[Frame]):
    """The frames of an answer after which the lane is somebody else's for a while.

    Args:
        frames: the answer.
        then: serves the lane until something comes that it does not expect, or the function that it is given says that it must end.
        otherwise: the answer where there is no lane to be handed over.
    """

    def __init__(self, frames: list[Frame], then: Callable[[Lane, Callable[[], bool]], None], otherwise: Callable[[], list[Frame]]) -> None:
        super().__init__(frames)
        self.then, self.otherwise = then, otherwise


class LaneService:
    """The lanes of one server.

    Args:
        answer: the frames that answer a request (frames, peer); may be called from any thread, one at a time.
    """

    def __init__(self, answer: Callable[[list[Any], str], list[Frame]]) -> None:
        self._answer = answer
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def offer(self, peer: str) -> str:
        """The name of a new lane for a peer, or "" where there is none to be had."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if not lanes_available() or len(self._threads) >= MOST_LANES:
            return ""
        try:
            lane = Lane.create()
        except LaneGone as error:
            logger.info("no lane: %s", error)
            return ""
        thread = threading.Thread(target=self._serve, args=(lane, peer), name="cloven-lane", daemon=True)
        thread.start()
        self._threads.append(thread)
        return lane.name

    def close(self) -> None:
        """End all lanes."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, lane: Lane, peer: str) -> None:
        joined, offered = False, time.monotonic()
        try:
            while not self._stop.is_set():
                frames = lane.receive(_LOOK_SECONDS)
                if frames is not None:
                    joined = True
                    answer = self._answer(frames, peer)
                    lane.send(answer)
                    if isinstance(answer, Handover):
                        answer.then(lane, lambda: not self._stop.is_set() and not lane.other_is_gone())
                elif not lane.other_is_gone():
                    joined = True
                elif joined or time.monotonic() - offered > _JOIN_SECONDS:
                    break
        except LaneGone as error:
            logger.warning("a lane was closed: %s", error)
        finally:
            lane.close()
