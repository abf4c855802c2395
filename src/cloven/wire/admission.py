"""Who may connect to a server: a ZAP handler (ZeroMQ RFC 27) with an allow-list, a uid check and a connection cap.

A CURVE server without a ZAP handler accepts every key. So the server's socket always sets ZAP_DOMAIN and ZAP_ENFORCE_DOMAIN: when
this thread is not there, every connection is refused.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from cloven.errors import ClovenError
from cloven.telemetry import log_event, logger
from cloven.wire.limits import HANDSHAKE_MILLISECONDS, MAX_CONNECTIONS

_COUNTED = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
DOMAIN = b"cloven"
_ENDPOINT = "inproc://zeromq.zap.01"
_POLL_MILLISECONDS = 100
_UNDECIDED_SECONDS = HANDSHAKE_MILLISECONDS / 1000 + 1  # libzmq closes what is older and was not admitted
_IPC_PEER = re.compile(r"[A-Za-z.]*:([0-9]+):([0-9]+):[0-9]*")  # libzmq 4.3 on Linux: "localhost:uid:gid:pid"


class Admission(threading.Thread):
    """Answers ZAP requests for the server sockets of one context.

    Args:
        context: the server's own context.
        allowed: gives the public keys (raw, 32 bytes) that may connect by CURVE; None where CURVE is not used.
        ipc: whether the sockets listen on ipc, so that every peer's user must be known.

    Guarantee: over CURVE, only listed keys connect; over ipc, only processes of this user; at most MAX_CONNECTIONS at a time,
    of which sockets that were opened and not admitted are none.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], allowed: Callable[[], frozenset[bytes]] | None, *, ipc: bool = False
    ) -> None:
        super().__init__(name="cloven-admission", daemon=True)
        self._allowed = allowed
        self._ipc = ipc
        self._stopping = threading.Event()
        self._open: dict[int, float] = {}  # by descriptor: when it was accepted, admitted or not
        self._consents: deque[float] = deque()  # when the last ones were given
        self._monitor: zmq.Socket[bytes] | None = None
        self.refused = 0  # connections
        self._zap = context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ENDPOINT)

    def guard(self, socket: zmq.Socket[bytes], curve_secret: bytes | None) -> None:
        """Set a server socket up so that every connection needs this handler's consent; before it is bound."""
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if curve_secret is not None:
            socket.curve_server = True
            socket.curve_secretkey = curve_secret
        self._monitor = socket.get_monitor_socket(_COUNTED | _FAILED)

    def run(self) -> None:
        """Answer until stopped."""
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                ready = dict(poller.poll(_POLL_MILLISECONDS))
                if self._monitor is not None and self._monitor in ready:
                    self._count(self._monitor.recv_multipart())
                if self._zap in ready:
                    self._zap.send_multipart(self._answer(self._zap.recv_multipart()))
        except zmq.ZMQError as error:
            logger.error("admission stopped (%s): no new connection will be accepted", error)
        finally:
            self._zap.close()

    @property
    def connections(self) -> int:
        """Sockets that are open, admitted or not yet; from any thread."""
        return len(self._open)

    def stop(self) -> None:
        """End the thread; from then on nobody can connect."""
        self._stopping.set()
        self.join()

    def _count(self, event_frames: list[bytes]) -> None:
        event = parse_monitor_message(event_frames)
        if event["event"] & _FAILED:  # refused by libzmq itself: no CURVE, or made for another server's key
            self._refuse("its handshake failed")
        elif event["event"] == zmq.EVENT_ACCEPTED:
            self._open[int(event["value"])] = time.monotonic()
        else:
            closed = self._open.pop(int(event["value"]), None)
            if closed is not None:
                log_event(logging.INFO, "connection_closed", "a connection was closed", open=len(self._open))

    def _admitted(self) -> int:
        """How many connections are open and admitted: strangers, who can open sockets, must not keep everybody else out.

        ZeroMQ does not tell which descriptor a handshake was about. An old one was admitted; of the others, as many as had consent lately.
        """
        since = time.monotonic() - _UNDECIDED_SECONDS
        while self._consents and self._consents[0] < since:
            self._consents.popleft()
        undecided = sum(accepted >= since for accepted in self._open.values())
        return len(self._open) - undecided + min(undecided, len(self._consents))

    def _answer(self, request: list[bytes]) -> list[bytes]:
        if len(request) < 6:
            return [b"1.0", b"", b"500", b"malformed", b"", b""]
        version, number, domain, address, _identity, mechanism, *credentials = request
        try:
            reason = self._refusal(version, domain, address.decode("ascii", "replace"), mechanism, credentials)
        except Exception as error:  # whatever happens, this thread answers, and the answer is no
            reason = f"the check failed ({type(error).__name__})"
        if reason is None:
            self._consents.append(time.monotonic())
            user = credentials[0].hex() if mechanism == b"CURVE" else "local"  # what `Server` calls the peer
            log_event(logging.INFO, "connection_opened", "a connection of %s was admitted", user, peer=user)
            return [version, number, b"200", b"OK", user.encode(), b""]
        self._refuse(reason)
        return [version, number, b"400", b"refused", b"", b""]

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        log_event(logging.WARNING, "connection_refused", "a connection was refused: %s", reason, reason=reason)

    def _refusal(self, version: bytes, domain: bytes, address: str, mechanism: bytes, credentials: list[bytes]) -> str | None:
        if version != b"1.0" or domain != DOMAIN:
            return "unknown ZAP version or domain"
        if self._admitted() >= MAX_CONNECTIONS:
            return f"{MAX_CONNECTIONS} connections are open already"
        peer = _IPC_PEER.fullmatch(address)
        if peer is not None and int(peer[1]) != os.getuid():
            return "another user's process on the ipc socket"
        if peer is None and self._ipc and sys.platform == "linux":
            return "a peer on the ipc socket whose user is not known"
        if self._allowed is None:
            return None if mechanism == b"NULL" else "a security mechanism that is not in use here"
        if mechanism != b"CURVE" or len(credentials) != 1:
            return "not CURVE"
        try:
            listed = credentials[0] in self._allowed()
        except ClovenError as error:
            return str(error)
        return None if listed else "an unlisted key"
