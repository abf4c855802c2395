"""What the front knows of a replica that was started, and what it needs of whoever starts them."""

from __future__ import annotations

import ssl
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, eq=False)
class Started:
    """A replica that serves.

    Args:
        name, scheme: of the model.
        running: requests that it computes at once.
        url: where it listens.
        tls: for connections to it; None: plain HTTP, in tests.
        ended: done when its process has ended.
        handle: the launcher's own.
    """

    name: str
    scheme: str
    running: int
    url: str
    tls: ssl.SSLContext | None
    ended: Future[Any]
    handle: Any = None


class Launcher(Protocol):
    """Starts and ends replicas; both wait, and may be called from any thread."""

    def start(self) -> Started:
        """One more replica, which has a session of its own.

        Raises:
            ClovenError: it cannot be started, and why.
        """

    def stop(self, started: Started) -> None:
        """End it: in order where it answers, and in any case."""
