"""A replica: the endpoint in a process of its own, which Ray starts. A trusted process: it holds the secret half, prompts and answers.

It serves the front alone (`pinned_tls`), and one more route, /replica: how it does, what it counts, and what it has logged meanwhile. Ray
is told paths, numbers and certificates; requests never pass through it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cloven.metrics.catalog import Source
from cloven.serving.half import Half
from cloven.serving.loading import LoadOptions
from cloven.serving.options import ServeOptions

STATE = "/replica"
_MOST_LINES = 1000  # of the log, between two looks of the front
_IDLE_SECONDS = 3600  # the front closes a connection sooner
_STOP_SECONDS = 12.0


@dataclass(frozen=True)
class Given:
    """What a replica is told, by way of Ray: nothing secret.

    Args:
        half, how, runtime, serving: as for an endpoint without replicas; `runtime` is a `RuntimeOptions`.
        front: the front's certificate.
        replicas: on one machine, which share its cores.
        harden: called first.
        log: the level of the log.
    """

    half: Half
    how: LoadOptions
    runtime: Any
    serving: ServeOptions
    front: str
    replicas: int
    harden: Callable[[], None]
    log: int


@dataclass(frozen=True)
class Told:
    """What a replica tells when it serves; see `launching.Started`."""

    name: str
    scheme: str
    running: int
    host: str
    port: int
    certificate: str


class KeptLog(logging.Handler):
    """Records until somebody fetches them; the oldest are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[tuple[int, str]] = deque(maxlen=_MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self._lines.append((record.levelno, record.getMessage()))

    def fetch(self) -> list[tuple[int, str]]:
        """What has come since the last time."""
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        return lines


class Replica:
    """One replica; Ray makes an instance in a process of its own. What goes wrong in `__init__` Ray reports as text only."""

    def start(self, given: Given) -> Told:
        """Load the model, open a session, serve.

        Raises:
            ClovenError: what is wrong.
        """
        given.harden()
        import ray
        import torch

        from cloven.model.quiet import quiet_transformers
        from cloven.serving.endpoint import Endpoint
        from cloven.serving.loading import load
        from cloven.serving.replicas.pinned_tls import Identity
        from cloven.serving.server import bind
        from cloven.telemetry import logger

        quiet_transformers()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // given.replicas))
        kept = KeptLog()
        logger.handlers = [kept]
        logger.setLevel(given.log)
        host = str(ray.util.get_node_ip_address())
        serving = replace(
            given.serving,
            host=host,
            port=0,
            api_key_file=None,
            tls_certificate=None,
            tls_key=None,
            insecure_open=True,  # to the front, which is asked for its certificate
            max_queue=given.serving.max_running,
        )
        listener = bind(serving)
        served = load(given.half, given.how, given.runtime)
        endpoint = Endpoint(served, serving)
        identity = Identity()
        app = _with_state(endpoint.application(None), lambda: served.state, kept, endpoint.samples)
        self._serve(app, listener, identity.context(given.front, server=True), serving)
        return Told(served.name, given.half.scheme, endpoint.running, host, listener.getsockname()[1], identity.certificate)

    def wait(self) -> None:
        """As long as it serves: Ray tells the front when this process has ended."""
        self._thread.join()

    def stop(self) -> None:
        """Answers in the making get some seconds; then the session is closed."""
        self._server.should_exit = True
        self._thread.join(_STOP_SECONDS)

    def _serve(self, app: Any, listener: socket.socket, tls: Any, serving: ServeOptions) -> None:
        import uvicorn

        from cloven.serving.server import configured

        config = configured(app, serving, _IDLE_SECONDS)
        config.load()
        config.ssl = tls
        self._server = uvicorn.Server(config)
        listener.listen()  # so that the first connection waits instead of failing
        self._thread = threading.Thread(target=lambda: self._server.run(sockets=[listener]), name="cloven-replica", daemon=True)
        self._thread.start()


def _with_state(app: Any, state: Callable[[], str], kept: KeptLog, samples: Source) -> Any:
    from starlette.responses import JSONResponse

    from cloven.serving.replicas.totals import told_of

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == STATE:
            await JSONResponse({"state": state(), "log": kept.fetch(), "samples": told_of(samples())})(scope, receive, send)
        else:
            await app(scope, receive, send)

    return asked
