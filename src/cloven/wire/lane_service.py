"""The server's side of lanes: one thread for each, which answers as the socket does."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloven.telemetry import logger
from cloven.wire.lane import PREFIX, Frame, Lane, LaneGone, lanes_available, short_path

MOST_LANES = 32
_SECRET_BYTES = 16
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
        folder: where the sockets are made over which lanes are passed: this user's alone.
        answer: the frames that answer a request (frames, peer); may be called from any thread, one at a time.
    """

    def __init__(self, folder: Path, answer: Callable[[list[Any], str], list[Frame]]) -> None:
        self._folder, self._answer = folder, answer
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def offer(self, peer: str) -> str:
        """The name of a new lane for a peer, or "" where there is none to be had."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if not lanes_available() or len(self._threads) >= MOST_LANES:
            return ""
        name = PREFIX + secrets.token_hex(_SECRET_BYTES)
        listener = socket.socket(socket.AF_UNIX)
        try:
            with short_path(self._folder, name) as path:
                listener.bind(path)
            listener.listen(1)
            listener.settimeout(_LOOK_SECONDS)
            thread = threading.Thread(target=self._serve, args=(listener, self._folder / name, peer), name="cloven-lane", daemon=True)
            thread.start()
        except (OSError, RuntimeError) as error:  # no /proc, say, or too many threads
            logger.info("no lane: %s", error)
            listener.close()
            (self._folder / name).unlink(missing_ok=True)
            return ""
        self._threads.append(thread)
        return name

    @property
    def open(self) -> int:
        """How many lanes there are now, offered ones among them."""
        return sum(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """End all lanes."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, listener: socket.socket, path: Path, peer: str) -> None:
        deadline = time.monotonic() + _JOIN_SECONDS
        try:
            while (connection := _accepted(listener)) is None:
                if self._stop.is_set() or time.monotonic() > deadline:
                    return
        finally:
            listener.close()
            path.unlink(missing_ok=True)
        with connection:
            try:
                self._answer_all(Lane.offered(connection), peer)
            except (LaneGone, ValueError) as error:  # ValueError: an answer that does not fit
                logger.warning("a lane was closed: %s", error)

    def _answer_all(self, lane: Lane, peer: str) -> None:
        try:
            while not self._stop.is_set():
                frames = lane.receive(_LOOK_SECONDS)
                if frames is not None:
                    answer = self._answer(frames, peer)
                    lane.send(answer)
                    if isinstance(answer, Handover):
                        answer.then(lane, lambda: not self._stop.is_set() and not lane.other_is_gone())
                elif lane.other_is_gone():
                    break
        finally:
            lane.close()


def _accepted(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except OSError:  # nobody came in time
        return None
