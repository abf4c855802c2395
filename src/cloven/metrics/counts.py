"""What a server counts. Always on: a few additions per request; nothing here knows how the numbers are published."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SOCKET, LANE, NATIVE = "socket", "lane", "native"
WAYS = (SOCKET, LANE, NATIVE)  # ZeroMQ; shared memory, answered by Python; shared memory, answered by C++


@dataclass
class Counted:
    """Requests that came one way: how many were answered, with how many rows and tokens; message bytes as the other side's telemetry
    counts them; seconds of work, without waiting for their turn. `hellos` of the requests asked for nothing but the bundle."""

    exchanges: int = 0
    rows: int = 0
    tokens: int = 0
    hellos: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0

    def add(self, other: Counted) -> None:
        """Add another record to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class ServerCounts:
    """The counts of one server; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = {way: Counted() for way in WAYS}
        self._live: list[tuple[str, Callable[[], Counted]]] = []
        self._refused: dict[str, int] = {}
        self._waiting = 0
        self._seconds_waiting = 0.0

    def answered(self, way: str, counted: Counted) -> None:
        """A request was answered, or several."""
        with self._lock:
            self._done[way].add(counted)

    def refused(self, way: str, code: str, counted: Counted) -> None:
        """A request got an error answer; of `counted`, its bytes and seconds count."""
        with self._lock:
            self._refused[code] = self._refused.get(code, 0) + 1
            self._done[way].add(Counted(bytes_in=counted.bytes_in, bytes_out=counted.bytes_out, seconds=counted.seconds))

    @contextlib.contextmanager
    def live(self, way: str, read: Callable[[], Counted]) -> Iterator[None]:
        """Meanwhile requests are answered where this object is not called: `read` says at any time how many so far; they stay counted."""
        entry = (way, read)
        with self._lock:
            self._live.append(entry)
        try:
            yield
        finally:
            with self._lock:
                self._live.remove(entry)
                self._done[way].add(read())

    @contextlib.contextmanager
    def turn(self, lock: threading.Lock) -> Iterator[None]:
        """Hold a lock, and count how long that had to be waited for."""
        if not lock.acquire(blocking=False):
            self._wait(lock)
        try:
            yield
        finally:
            lock.release()

    def _wait(self, lock: threading.Lock) -> None:
        with self._lock:
            self._waiting += 1
        started = time.perf_counter()
        lock.acquire()
        with self._lock:
            self._waiting -= 1
            self._seconds_waiting += time.perf_counter() - started

    def ways(self) -> dict[str, Counted]:
        """Everything so far, by way."""
        with self._lock:
            found = {way: Counted(**vars(done)) for way, done in self._done.items()}
            for way, read in self._live:
                found[way].add(read())
        return found

    def exchanges(self) -> int:
        """Requests answered so far: cheap, for whoever looks between any two of them."""
        with self._lock:
            return sum(done.exchanges for done in self._done.values()) + sum(read().exchanges for _, read in self._live)

    def total(self) -> Counted:
        """The sum over all ways."""
        total = Counted()
        for counted in self.ways().values():
            total.add(counted)
        return total

    def refusals(self) -> dict[str, int]:
        """Requests that got an error answer, by the error's code."""
        with self._lock:
            return dict(self._refused)

    def waits(self) -> tuple[int, float]:
        """Requests that wait for their turn now; seconds that all together have waited."""
        with self._lock:
            return self._waiting, self._seconds_waiting
