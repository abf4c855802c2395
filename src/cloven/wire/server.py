"""A server: one socket, guarded, that answers one request at a time and lives on whatever it receives."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import zmq

from cloven.errors import BadInput, ClovenError, RunError
from cloven.metrics.catalog import Sample
from cloven.metrics.counts import LANE, SOCKET, Counted, ServerCounts
from cloven.telemetry import log_event, logger
from cloven.wire.address import check_socket_folder, parse_address, require_free_path
from cloven.wire.admission import Admission
from cloven.wire.keys import WorkerKeys
from cloven.wire.lane_service import Handover, LaneService
from cloven.wire.limits import HANDSHAKE_MILLISECONDS, LINGER_MILLISECONDS, MAX_FRAME_BYTES, QUEUED_MESSAGES
from cloven.wire.schema import AskLane, ErrorAnswer, Laned, MalformedMessage, Schema

_POLL_MILLISECONDS = 100
_REPORT_SECONDS = 60.0
_IDLE_SECONDS = 1.0  # without a request
_REFUSALS_SECONDS = 1.0  # between two lines about refused requests, whoever sends how many
Frame = bytes | memoryview

PLAIN_TCP_BANNER = (
    "INSECURE: this {what} listens on plain tcp: anybody on the network can use it, and read and alter the traffic. "
    "Use keys made by `cloven keygen`."
)


class Server(ABC):
    """Answers requests at an address; a subclass says how, in `answer`, and calls `bind` when it is ready.

    Args:
        what: what to call the server in messages.
        address: ipc://PATH or tcp://HOST:PORT; inproc://NAME with a shared `context`, for tests.
        schema: the messages.
        keys: the server's folder of keys; needed for tcp.
        insecure_plain_tcp: listen on tcp without keys, with a banner.

    Guarantee to its operator: malformed requests get an error answer; message sizes and queues are bounded (not the number of frames in
    a message, which ZeroMQ cannot bound); over CURVE only listed keys connect, over ipc only this user.
    """

    def __init__(
        self,
        what: str,
        address: str,
        schema: Schema,
        *,
        keys: WorkerKeys | None = None,
        insecure_plain_tcp: bool = False,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        parsed = parse_address(address)
        if parsed.scheme == "tcp" and keys is None:
            if not insecure_plain_tcp:
                raise BadInput(f"{address}: tcp needs keys; make them with `cloven keygen DIR` and give --keys DIR")
            logger.warning(PLAIN_TCP_BANNER.format(what=what))
        check_socket_folder(parsed, create=True)
        self._what, self._address, self._parsed, self._schema, self._keys = what, address, parsed, schema, keys
        self.counts = ServerCounts()
        self._request = Counted()  # of the request that is being answered: `answer` adds its rows
        self._refusals_told, self._refusals_told_at = 0, -_REFUSALS_SECONDS
        self._one_at_a_time = threading.Lock()
        # with keys there are none: a lane would go round CURVE
        self._lanes = LaneService(parsed.path.parent, self._over_lane) if parsed.path is not None and keys is None else None
        self._stop = threading.Event()
        self._given_context = context
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._admission: Admission | None = None
        self._socket: zmq.Socket[bytes] | None = None

    def bind(self) -> None:
        """Listen: when everything that an answer needs is there.

        Raises:
            RunError, BadInput: the address is taken, or not this machine's.
        """
        # A ROUTER numbers its anonymous peers from libc's rand(), which nobody seeds: a peer that claims a number to come would have libzmq
        # abort this process at the connection that gets it. With a secret seed it has to guess 32 bits.
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "big"))
        self._context = self._given_context or zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = QUEUED_MESSAGES
        self._socket.maxmsgsize = MAX_FRAME_BYTES
        self._socket.linger = LINGER_MILLISECONDS
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MILLISECONDS)
        self._socket.ipv6 = "[" in self._address
        if self._parsed.scheme != "inproc":
            self._admission = Admission(self._context, self._keys.allowed if self._keys else None, ipc=self._parsed.scheme == "ipc")
            self._admission.guard(self._socket, self._keys.own.secret if self._keys else None)
            self._admission.start()
        try:
            require_free_path(self._parsed)
            self._socket.bind(self._address)
        except ClovenError:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise RunError(f"cannot listen at {self._address}: {error.strerror or error}") from error
        log_event(logging.INFO, "server_started", "the %s listens at %s", self._what, self._address, role=self._what)

    @property
    def role(self) -> str:
        """What the server is called in messages, logs and metrics."""
        return self._what

    @property
    def answered(self) -> int:
        """Requests answered so far."""
        return self.counts.exchanges()

    @property
    def refused(self) -> int:
        """Requests that got an error answer so far."""
        return sum(self.counts.refusals().values())

    def samples(self) -> Iterator[Sample]:
        """What is published of this server: see `cloven.metrics.catalog`. From any thread."""
        for way, counted in self.counts.ways().items():
            for name, value in (
                ("exchanges_total", counted.exchanges),
                ("rows_total", counted.rows),
                ("received_bytes_total", counted.bytes_in),
                ("sent_bytes_total", counted.bytes_out),
                ("work_seconds_total", counted.seconds),
            ):
                yield Sample(f"cloven_{name}", float(value), (way,))
        for code, count in self.counts.refusals().items():
            yield Sample("cloven_refused_total", float(count), (code,))
        waiting, seconds = self.counts.waits()
        yield Sample("cloven_waiting_requests", float(waiting))
        yield Sample("cloven_wait_seconds_total", seconds)
        yield Sample("cloven_hellos_total", float(self.counts.total().hellos))
        yield Sample("cloven_lanes", float(self._lanes.open if self._lanes is not None else 0))
        if self._admission is not None:
            yield Sample("cloven_connections", float(self._admission.connections))
            yield Sample("cloven_connections_refused_total", float(self._admission.refused))

    @abstractmethod
    def answer(self, frames: list[Any], peer: str) -> list[Frame]:
        """The frames that answer a request.

        Args:
            frames: buffers of the request, header first.
            peer: the peer's public key in hexadecimal over CURVE, "local" over ipc, "" where nobody was asked.

        Raises:
            MalformedMessage: becomes an error answer.
        """

    def idle(self) -> bool:
        """Called while nobody asks anything: some milliseconds of work that would make somebody wait otherwise; whether there is more."""
        return False

    def _idle_work(self) -> bool:
        with self._one_at_a_time:
            try:
                return not self._stop.is_set() and self.idle()
            except Exception:
                logger.exception("work done ahead failed")
                return False

    def serve(self) -> None:
        """Answer requests until `stop`; then close."""
        assert self._socket is not None, "bind comes first"
        reported = busy = time.monotonic()
        asked = self.answered
        try:
            while not self._stop.is_set():
                try:
                    if self._socket.poll(_POLL_MILLISECONDS):
                        self._one_request(self._socket)
                    if self.answered != asked:
                        asked, busy = self.answered, time.monotonic()
                    while time.monotonic() - busy > _IDLE_SECONDS and self.answered == asked and self._idle_work():
                        if self._socket.poll(0):
                            break
                except zmq.ZMQError as error:
                    if error.errno == zmq.ETERM:
                        break
                    logger.error("a message was dropped: %s", error)
                if time.monotonic() - reported > _REPORT_SECONDS:
                    reported = time.monotonic()
                    logger.info("answered %d requests (%d rows), refused %d", self.answered, self.counts.total().rows, self.refused)
        finally:
            self.close()

    def stop(self) -> None:
        """Ask `serve` to end; safe from a signal handler or another thread."""
        self._stop.set()

    def close(self) -> None:
        """Close the socket; no more connections."""
        if self._socket is not None and not self._socket.closed:
            self._socket.close()
            if self._lanes is not None:
                self._lanes.close()
            if self._admission is not None:
                self._admission.stop()
            if self._context is not None and self._given_context is None:
                self._context.destroy(linger=LINGER_MILLISECONDS)
            answered, refused = self.answered, self.refused
            message = "stopped after %d answers, %d refusals"
            log_event(logging.INFO, "server_stopped", message, answered, refused, role=self._what, answered=answered, refused=refused)

    def _one_request(self, socket: zmq.Socket[bytes]) -> None:
        peer, *frames = socket.recv_multipart(copy=False)
        buffers, name = [frame.buffer for frame in frames], self._name_of(frames)
        answer = self._offered(buffers, name) or self._answered(buffers, name, SOCKET)
        socket.send_multipart([peer.bytes, *answer], copy=False)

    def _offered(self, frames: list[Any], peer: str) -> list[Frame] | None:
        """The answer to a peer that asks for a lane; None where it asks for something else."""
        if len(frames) != 1 or b"\xa4lane" not in bytes(frames[0]):
            return None
        try:
            message, _ = self._schema.unpack(frames)
        except MalformedMessage:
            return None
        if not isinstance(message, AskLane):
            return None
        answer: list[Frame] = [self._schema.pack(Laned(message.id, self._lanes.offer(peer) if self._lanes is not None else ""))]
        self.counts.answered(SOCKET, Counted(exchanges=1, bytes_in=_size(frames), bytes_out=_size(answer)))
        return answer

    def _over_lane(self, frames: list[Any], peer: str) -> list[Frame]:
        return self._answered(frames, peer, LANE)

    def _answered(self, frames: list[Any], peer: str, way: str) -> list[Frame]:
        """The frames of an answer, whatever came: from the socket or a lane, one request at a time."""
        code = ""
        with self.counts.turn(self._one_at_a_time):
            started = time.perf_counter()
            counted = self._request = Counted(exchanges=1)
            try:
                answer = self.answer(frames, peer)
            except MalformedMessage as error:
                code = error.code
                answer = [self._schema.pack(ErrorAnswer(error.request, code, str(error)))]
            except Exception:  # the server lives on; the traceback names code lines, never values
                code = "internal"
                logger.exception("a request failed")
                answer = [self._schema.pack(ErrorAnswer(0, code, f"the {self._what} failed on this request; its log says why"))]
            counted.seconds = time.perf_counter() - started
        if isinstance(answer, Handover) and way == SOCKET:  # a socket cannot be handed over
            answer = answer.otherwise()
        counted.bytes_in, counted.bytes_out = _size(frames), _size(answer)
        if code:  # before the answer goes: who has it finds it counted
            self.counts.refused(way, code, counted)
            self._tell_refusal(code, peer)
        else:
            self.counts.answered(way, counted)
        return answer

    def _tell_refusal(self, code: str, peer: str) -> None:
        refused, now = self.refused, time.monotonic()
        if now - self._refusals_told_at < _REFUSALS_SECONDS:
            return
        new, self._refusals_told, self._refusals_told_at = refused - self._refusals_told, refused, now
        message = "refused %d requests, the last one (%s) of %s"
        log_event(logging.INFO, "request_refused", message, new, code, peer or "a peer", code=code, requests=new, peer=peer)

    def _name_of(self, frames: list[Any]) -> str:
        if self._admission is None or not frames:
            return ""
        try:
            return str(frames[0].get("User-Id"))
        except zmq.ZMQError:
            return ""


def _size(frames: list[Any]) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)
