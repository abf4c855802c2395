"""The worker's service: answers `multiply` requests of any number of sessions, and lives on whatever it receives.

It keeps no state between requests, so a restarted worker goes on at once, and a repeated request gets the same answer. It logs counts
only. Its transport key is its only secret. One request is computed at a time, with all threads of the machine.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import zmq

from cloven.errors import BadInput, ClovenError, RunError
from cloven.telemetry import logger
from cloven.wire.address import check_socket_folder, parse_address, require_free_path
from cloven.wire.admission import Admission
from cloven.wire.keys import WorkerKeys
from cloven.wire.limits import HANDSHAKE_MILLISECONDS, LINGER_MILLISECONDS, MAX_FRAME_BYTES, QUEUED_MESSAGES, rows_per_exchange
from cloven.wire.messages import (
    ErrorAnswer,
    Hello,
    MalformedMessage,
    Message,
    Multiply,
    Product,
    Welcome,
    pack,
    residue_frame,
    residues_of_frame,
    unpack,
)
from cloven.worker.matrices import Matrices
from cloven.worker.transcript import Transcript

_POLL_MILLISECONDS = 100
_REPORT_SECONDS = 60.0
Frame = bytes | memoryview

PLAIN_TCP_BANNER = (
    "INSECURE: this worker listens on plain tcp: anybody on the network can use it, and read and alter the traffic. "
    "Use keys made by `cloven keygen`."
)


class Worker:
    """Serves one exposed bundle at one address.

    Args:
        folder: OUT/exposed.
        address: ipc://PATH or tcp://HOST:PORT; inproc://NAME with a shared `context`, for tests.
        keys: the worker's folder of keys; needed for tcp.
        device: "cpu", "cuda" or "cuda:N".
        insecure_plain_tcp: listen on tcp without keys, with a banner.
        record: write every row received to this file, anew, for audits: what a curious worker would keep.

    Guarantee to its operator: malformed requests get an error answer; message sizes and queues are bounded (not the
    number of frames in a message, which ZeroMQ cannot bound); over CURVE only listed keys
    connect, over ipc only this user. It is the untrusted party: nothing is guaranteed to anyone else.
    """

    def __init__(
        self,
        folder: str | Path,
        address: str,
        *,
        keys: WorkerKeys | None = None,
        device: str = "cpu",
        insecure_plain_tcp: bool = False,
        record: Path | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        parsed = parse_address(address)
        if parsed.scheme == "tcp" and keys is None:
            if not insecure_plain_tcp:
                raise BadInput(f"{address}: tcp needs keys; make them with `cloven keygen DIR` and give --keys DIR")
            logger.warning(PLAIN_TCP_BANNER)
        check_socket_folder(parsed, create=True)
        self.matrices = Matrices.load(Path(folder), device)
        self.answered = 0
        self.refused = 0
        self._rows = 0
        self._transcript = Transcript(record) if record is not None else None
        self._stop = threading.Event()
        self._context = context or zmq.Context()
        self._owns_context = context is None
        self._admission: Admission | None = None
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = QUEUED_MESSAGES
        self._socket.maxmsgsize = MAX_FRAME_BYTES
        self._socket.linger = LINGER_MILLISECONDS
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MILLISECONDS)
        self._socket.ipv6 = "[" in address
        if parsed.scheme != "inproc":
            self._admission = Admission(self._context, keys.allowed if keys else None, ipc=parsed.scheme == "ipc")
            self._admission.guard(self._socket, keys.own.secret if keys else None)
            self._admission.start()
        try:
            require_free_path(parsed)
            self._socket.bind(address)
        except ClovenError:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise RunError(f"cannot listen at {address}: {error.strerror or error}") from error

    def serve(self) -> None:
        """Answer requests until `stop`; then close."""
        reported = time.monotonic()
        try:
            while not self._stop.is_set():
                try:
                    if self._socket.poll(_POLL_MILLISECONDS):
                        self._one_request()
                except zmq.ZMQError as error:
                    if error.errno == zmq.ETERM:
                        break
                    logger.error("a message was dropped: %s", error)
                if time.monotonic() - reported > _REPORT_SECONDS:
                    reported = time.monotonic()
                    logger.info("answered %d requests (%d rows), refused %d", self.answered, self._rows, self.refused)
        finally:
            self.close()

    def stop(self) -> None:
        """Ask `serve` to end; safe from a signal handler or another thread."""
        self._stop.set()

    def close(self) -> None:
        """Close the socket; no more connections."""
        if not self._socket.closed:
            self._socket.close()
            if self._admission is not None:
                self._admission.stop()
            if self._transcript is not None:
                self._transcript.close()
            if self._owns_context:
                self._context.destroy(linger=LINGER_MILLISECONDS)
            logger.info("stopped after %d answers, %d refusals", self.answered, self.refused)

    def _one_request(self) -> None:
        peer, *frames = self._socket.recv_multipart(copy=False)
        try:
            answer = self._answer([frame.buffer for frame in frames])
            self.answered += 1
        except MalformedMessage as error:
            self.refused += 1
            answer = [pack(ErrorAnswer(error.request, error.code, str(error)))]
        except Exception:  # the worker lives on; the traceback names code lines, never values
            self.refused += 1
            logger.exception("a request failed")
            answer = [pack(ErrorAnswer(0, "internal", "the worker failed on this request; its log says why"))]
        self._socket.send_multipart([peer.bytes, *answer], copy=False)

    def _answer(self, frames: list[Any]) -> list[Frame]:
        message, payload = unpack(frames)
        self._require_bundle(message)
        if isinstance(message, Hello):
            return [pack(Welcome(message.id, self.matrices.bundle, len(self.matrices.groups)))]
        if not isinstance(message, Multiply) or payload is None:
            raise MalformedMessage("malformed", "this message is an answer, not a request", message.id)
        if message.group >= len(self.matrices.groups):
            raise MalformedMessage("group", f"no group {message.group}: there are {len(self.matrices.groups)}", message.id)
        w = self.matrices.groups[message.group]
        if message.rows > rows_per_exchange(w.columns, w.rows):
            raise MalformedMessage("size", f"{message.rows} rows at once are too many for this group", message.id)
        c = residues_of_frame(payload, message.rows, w.columns, message.id)
        if self._transcript is not None:
            self._transcript.append(message.group, c)
        z = self.matrices.multiply(message.group, c)
        self._rows += message.rows
        return [pack(Product(message.id, message.rows)), residue_frame(z)]

    def _require_bundle(self, message: Message) -> None:
        if isinstance(message, Hello | Multiply) and message.bundle != self.matrices.bundle:
            raise MalformedMessage("bundle", f"this worker holds bundle {self.matrices.bundle.hex()}", message.id)
