"""Metrics over HTTP: GET /metrics, one text, for Prometheus and `cloven top`.

Whoever asks is not trusted: a request is its first 8 KiB, within five seconds, whatever comes after; at most eight are open at a time, and
texts are made one after another, at most twenty a second, so that nobody can keep the server from its work by asking. There is neither
encryption nor a password: it listens on the loopback address unless told otherwise.
"""

from __future__ import annotations

import io
import socket
import socketserver
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from cloven.errors import BadInput, RunError
from cloven.local_host import LOCAL_HOSTS, named
from cloven.metrics.catalog import Source
from cloven.metrics.collector import registry_of
from cloven.telemetry import logger

MOST_REQUEST_BYTES = 8192
MOST_OPEN = 8
SECONDS = 5.0  # for a request to come, and for its answer to go
_SPACING_SECONDS = 0.05
_PATH = "/metrics"


class MetricsEndpoint:
    """Serves samples over HTTP from threads of its own, until `close`; a context manager.

    Args:
        host: an IP address or name of this machine.
        port: 0: any free one; see `address`.
        role: what the process is, one of `ROLES`.
        sources: see `Source`.

    Raises:
        BadInput, RunError: there is no such host; the port is taken.

    Guarantee: numbers and the labels of docs/metrics.md, nothing else. Not hidden, from whoever can connect: how much is asked and when.
    """

    def __init__(self, host: str, port: int, role: str, sources: Sequence[Source]) -> None:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        except (OSError, UnicodeError) as error:
            raise BadInput(f"metrics host {host!r}: no address of this machine") from error
        try:
            self._server = _HttpServer((host, port), family, registry_of(role, sources))
        except OSError as error:
            raise RunError(f"metrics: cannot listen at {host}:{port}: {error.strerror or error}") from error
        host = f"[{host}]" if ":" in host else host
        self.address = f"http://{host}:{self._server.server_address[1]}{_PATH}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="cloven-metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> MetricsEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; requests under way are not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _HttpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], family: int, registry: CollectorRegistry) -> None:
        self.address_family = family
        self._registry = registry
        self._places = threading.BoundedSemaphore(MOST_OPEN)
        self._one_at_a_time = threading.Lock()
        self._last = -_SPACING_SECONDS
        super().__init__(address, _Handler)

    def text(self) -> bytes:
        """The text, made now."""
        with self._one_at_a_time:
            time.sleep(max(0.0, self._last + _SPACING_SECONDS - time.monotonic()))
            try:
                return generate_latest(self._registry)
            finally:
                self._last = time.monotonic()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the request, or none: then it is hung up."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the request's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that hangs up, or is too slow, is nothing to report; nor is a thread that cannot be had."""
        del request, client_address
        logger.debug("a request for metrics came to nothing", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    server_version = "cloven"
    sys_version = ""

    def setup(self) -> None:
        """Read the request's head first, within one time for all of it: it is parsed from memory."""
        head = _head(self.request)
        self.request.settimeout(SECONDS)  # for the answer: of sendall as a whole
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(io.BytesIO(head))

    def do_GET(self) -> None:
        """Answer."""
        if not self._by_its_name():
            self.send_error(421)
            return
        if self.path.partition("?")[0] != _PATH:
            self.send_error(404)
            return
        try:
            text = self.server.text()
        except Exception:
            logger.exception("the metrics could not be read")
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _by_its_name(self) -> bool:
        """Where only this machine can connect, a web page in its browser could, by a name of its own."""
        host = self.headers.get("Host")
        return host is None or self.server.server_address[0] not in LOCAL_HOSTS or named(host) in LOCAL_HOSTS

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The code's own words: what a stranger sent is not said again."""
        del message, explain
        super().send_error(code)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what a stranger asks for is not logged."""


def _head(connection: socket.socket) -> bytes:
    deadline, head = time.monotonic() + SECONDS, b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < MOST_REQUEST_BYTES:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not come in time")
        connection.settimeout(left)
        more = connection.recv(MOST_REQUEST_BYTES - len(head))
        if not more:
            break
        head += more
    return head
