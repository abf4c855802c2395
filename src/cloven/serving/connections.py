"""Connections that say nothing: each is closed after some seconds, and the oldest of them as soon as another one needs its place.

uvicorn bounds connections and the time between two requests, but not the time that a request's head may take: without this, whoever can
connect keeps everybody out by holding a few hundred sockets.
"""

from __future__ import annotations

import asyncio
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0


class TimelyProtocol(H11Protocol):
    """HTTP/1.1 on one connection."""

    since = 0.0  # it has been without a whole request's head
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`; makes room for itself."""
        super().connection_made(transport)
        self._expect()
        if self.limit_concurrency is None or len(self.connections) < self.limit_concurrency:
            return
        idle = [one for one in self.connections if isinstance(one, TimelyProtocol) and one is not self and not one.asked]
        if idle:
            min(idle, key=lambda one: one.since).hang_up()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if not self.asked:
            self._expect()
        super().data_received(data)
        if self.asked:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def asked(self) -> bool:
        """Whether a request is being read or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def hang_up(self) -> None:
        """Close it at once: it has its place no longer."""
        self.connections.discard(self)
        self.transport.abort()

    def _expect(self) -> None:
        if self._late is None:
            self.since = time.monotonic()
            self._late = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if not self.asked:
            self.hang_up()
