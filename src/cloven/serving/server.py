"""The endpoint on a socket: bound before anything is loaded, served by uvicorn until a signal."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from cloven.errors import BadInput, RunError
from cloven.serving.connections import TimelyProtocol
from cloven.serving.options import ServeOptions
from cloven.telemetry import logger

_ANSWER_SECONDS, _GRACE_SECONDS = 4.0, 6  # for answers in the making, when the server is stopped; until what is left is cut off
_IDLE_SECONDS = 30  # of a connection without a request
_BACKLOG = 128
_SPARE_CONNECTIONS = 256  # besides those that compute or wait
_FILES = 65_536

OPEN_BANNER = (
    "INSECURE: this endpoint listens on the network and asks nobody for a key: everybody can use the model. Give it --api-key-file FILE."
)


class _NoContents(logging.Filter):
    """uvicorn logs what an unexpected exception says, and that may quote a request: its type is enough. What anybody who connects can
    make it say, as often as he likes, it says once a second at most."""

    _said = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        if record.levelno < logging.ERROR:
            now = time.monotonic()
            if now - self._said < 1:
                return False
            self._said = now
        if record.exc_info:
            kind = record.exc_info[0]
            record.msg, record.args = f"a request failed: {kind.__name__ if kind else 'unknown'}", ()
            record.exc_info = record.exc_text = None
        return True


class Application(Protocol):
    """What is served, and how its answers end when the server is stopped; called in the server's event loop."""

    def refuse(self) -> None:
        """Nobody gets a turn any longer."""

    def end_answers(self) -> None:
        """Who is being answered is told that the server is stopping."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, application: Application, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._application, self._ready = application, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._application.refuse()
        asyncio.get_running_loop().call_later(_ANSWER_SECONDS, self._application.end_answers)
        await super().shutdown(sockets)


def bind(options: ServeOptions) -> socket.socket:
    """A socket at the address, which does not listen yet.

    Raises:
        RunError: it is taken, or not this machine's.
        BadInput: the certificate or its key cannot be used.
    """
    if options.tls_certificate is not None and options.tls_key is not None:
        for path in (options.tls_certificate, options.tls_key):
            if not path.is_file():
                raise BadInput(f"{path}: no such file; TLS needs a certificate and its key in PEM form")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_certificate, options.tls_key, lambda: "")
        except (ssl.SSLError, OSError) as error:
            raise BadInput(
                f"{options.tls_certificate}, {options.tls_key}: no certificate with its key, in PEM form without a passphrase"
            ) from error
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise BadInput(f"{options.host}: no address of this machine: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.set_inheritable(False)
    except OSError as error:
        listener.close()
        raise RunError(f"cannot listen at {options.host}, port {options.port}: {error.strerror or error}") from error
    return listener


def configured(app: ASGIApp, options: ServeOptions, idle: int = _IDLE_SECONDS) -> uvicorn.Config:
    """How uvicorn serves here: no log of requests, no name, bounded connections.

    Args:
        idle: seconds that a connection may be without a request.
    """
    log = logging.getLogger("uvicorn.error")
    log.handlers, log.filters, log.propagate = list(logger.handlers), [_NoContents()], False
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        loop="asyncio",
        http=TimelyProtocol,
        backlog=_BACKLOG,
        limit_concurrency=options.max_queue + _SPARE_CONNECTIONS,
        timeout_keep_alive=idle,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
    )


def _allow_files() -> None:
    """As many open files as this process may have: sockets whose TLS has not begun count too, and there are a thousand by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(app: ASGIApp, application: Application, listener: socket.socket, options: ServeOptions, ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or SIGINT; answers in the making have some seconds to end.

    Args:
        app: of the application, behind its gate.
        listener: from `bind`.
        ready: called when the first request would be answered.

    Raises:
        RunError: another process has begun to listen at the address since it was bound.
    """
    config = configured(app, options)
    _allow_files()
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended
        signal.signal(number, lambda *_: None)
    try:
        _Server(config, application, ready).run(sockets=[listener])
    except OSError as error:
        raise RunError(f"cannot listen at {options.host}, port {options.port}: {error.strerror or error}") from error
