"""The trusted side's channel to one worker: one exchange at a time, counted, bounded in time, repeated byte by byte.

An exchange is
    1. send the header and the masked rows c;
    2. do trusted work meanwhile;
    3. wait for the answer with this request's id; drop answers with another id;
    4. when the connection was lost and is back, send the identical bytes once more (the worker keeps no state);
    5. after the timeout, give up: the request's pads are burnt.
On one host, messages go through shared memory where both sides can and they fit (`cloven.wire.lane`): no thread stands between. When the
other side is gone, the identical bytes go through the socket, as in 4.
Only masked residues ever enter a send buffer.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
import zmq
from torch import Tensor
from zmq.utils.monitor import recv_monitor_message

from cloven.errors import (
    BadInput,
    BudgetExhausted,
    ClovenError,
    ForeignBundle,
    PeerRefused,
    RunError,
    SessionClosed,
    WorkerRefused,
    WorkerTimeout,
    WorkerUnreachable,
)
from cloven.telemetry import LayerStatistics, Telemetry, logger
from cloven.wire.address import Address, check_socket_folder, parse_address
from cloven.wire.keys import TrustedKeys
from cloven.wire.lane import PREFIX_BYTES, LaneGone
from cloven.wire.lane_client import LaneClient
from cloven.wire.limits import DEFAULT_TIMEOUT, HANDSHAKE_MILLISECONDS, MAX_FRAME_BYTES, MAX_FRAMES, QUEUED_MESSAGES
from cloven.wire.messages import WORKER, Multiply, Product, require_residues, residue_frame, residues_of_frame
from cloven.wire.schema import AskLane, ErrorAnswer, Hello, Laned, MalformedMessage, Schema, Serve, Serving, Welcome

Frame = bytes | memoryview
Watcher = Callable[[str, Tensor], None]  # a group's name, and the masked rows int32 [M, K] that are sent for it: its own during the call
_M = TypeVar("_M")
_MOST_REPETITIONS = 2
_NEVER = -2  # no lane's generation
_UNKNOWN = 2**63  # how many rows are answered without a header: more than any
_LONGEST_RTT = 60.0
_SLEEP_ENDS_EARLY = 5e-4  # seconds: a sleep ends late by about a tenth of a millisecond
_ERRORS: dict[str, type[ClovenError]] = {"bundle": ForeignBundle, "budget": BudgetExhausted}

PLAIN_TCP_BANNER = (
    "INSECURE: plain tcp, no encryption and no authentication. Anybody on the network can read and alter the traffic. "
    "Use keys made by `cloven keygen`."
)


def checked_rtt(seconds: float) -> float:
    """A simulated round trip in seconds.

    Raises:
        BadInput: it is negative, not a number, or a minute or more.
    """
    if not 0 <= seconds < _LONGEST_RTT:
        raise BadInput(f"simulated round trip {seconds} s: give 0 or more, less than {_LONGEST_RTT:g}")
    return seconds


def _delay(seconds: float) -> None:
    """Wait exactly: asleep, and awake for the last half millisecond."""
    until = time.monotonic() + seconds
    if seconds > _SLEEP_ENDS_EARLY:
        time.sleep(seconds - _SLEEP_ENDS_EARLY)
    while time.monotonic() < until:
        pass


class _OwnWork:
    """What this side does while the other one computes: once, whichever way the frames go. `done` is when."""

    def __init__(self, meanwhile: Callable[[], None] | None) -> None:
        self._meanwhile, self.done = meanwhile, 0.0

    @property
    def pending(self) -> bool:
        """Whether there is something to do."""
        return self._meanwhile is not None

    def do(self) -> None:
        """Do it, the first time."""
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()
        self.done = self.done or time.monotonic()


class Exchanger(Protocol):
    """What `offload` needs of a channel; tests put liars and recorders behind it."""

    def multiply(
        self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None], into: Tensor | None = None
    ) -> Tensor:
        """z [M, columns_out] for masked rows c [M, K] of a group, unverified."""


class Channel:
    """A connection to one worker.

    Args:
        address: ipc://PATH, tcp://HOST:PORT, or inproc://NAME with the worker's `context`.
        bundle: the 16-byte id of the bundle that the worker must hold.
        keys: CURVE keys with the worker's key pinned; needed for tcp.
        timeout: seconds an answer may take.
        insecure_plain_tcp: allow tcp without keys, with a banner.
        schema, peer: the peer's messages, and what to call it: the command that starts it.
        spin: seconds to look for an answer without sleeping: waking up costs more than a short answer takes. Not for a peer that needs
            this core.
        patience: seconds that a lost connection may take to come back; None: the timeout. Less where there is somebody else to ask.
        simulated_rtt: for measurements: seconds by which every exchange takes longer, as over a link with that round trip; may be
            changed between exchanges. It does not count against `timeout`.

    Guarantee: bounded waiting; over CURVE, traffic is encrypted and the worker is the holder of the pinned key. Answers are parsed
    strictly, not verified: that is `offload`'s step. Not hidden: the number, size and time of exchanges.
    """

    def __init__(
        self,
        address: str,
        bundle: bytes,
        *,
        keys: TrustedKeys | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        insecure_plain_tcp: bool = False,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        telemetry: Telemetry | None = None,
        schema: Schema = WORKER,
        peer: str = "worker",
        spin: float = 0.0,
        patience: float | None = None,
        simulated_rtt: float = 0.0,
    ) -> None:
        if not 0 < timeout < 86_400:
            raise BadInput(f"timeout {timeout}: give seconds, more than 0")
        self.simulated_rtt = checked_rtt(simulated_rtt)
        self.address: Address = parse_address(address)
        self.timeout = timeout
        self.telemetry = telemetry or Telemetry()
        self.bundle = bundle
        self._schema, self._peer, self._spin = schema, peer, spin
        self._given_patience = patience
        self.part = ""
        self.watcher: Watcher | None = None  # is shown the rows that leave, once they are masked; not to change them
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        if self.address.scheme == "tcp" and keys is None:
            if not insecure_plain_tcp:
                raise BadInput(f"{address}: tcp needs keys; make them with `cloven keygen DIR` and give --keys DIR")
            logger.warning(PLAIN_TCP_BANNER)
        check_socket_folder(self.address, create=False)
        self._context = context or zmq.Context()
        self._owns_context = context is None
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.ipv6 = "[" in address
        self._socket.sndhwm = self._socket.rcvhwm = QUEUED_MESSAGES
        self._socket.maxmsgsize = MAX_FRAME_BYTES
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MILLISECONDS)
        heartbeat = max(1000, int(1000 * timeout / 6))  # a dead peer or network shows as a disconnect well within the timeout
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, heartbeat)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * timeout))  # a large answer delays the reply to a heartbeat
        if keys is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.own.public, keys.own.secret
            self._socket.curve_serverkey = keys.worker
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_CONNECTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_DISCONNECTED
        )
        self._connected = self.address.scheme == "inproc"
        self._ever_connected = self._connected
        self._lost = None if self._connected else time.monotonic()  # since when there is no connection
        self._reconnected = False
        self._unsent: list[Frame] | None = None
        path = self.address.path if keys is None else None  # a lane would go round CURVE
        self._lane = LaneClient(path.parent if path is not None else None, spin)
        self._serving_at = _NEVER
        self._most = _UNKNOWN
        self._handshake_failures = 0
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise BadInput(f"{address}: one cannot connect to that: {error.strerror or error}") from error

    def hello(self) -> int:
        """Ask whether the worker holds the bundle.

        Returns:
            The number of groups that it serves.

        Raises:
            ForeignBundle, PeerRefused, WorkerUnreachable, WorkerTimeout.
        """
        request = Hello(self.next_id(), self.bundle)
        welcome = self.exchange("hello", request, [], lambda message, _: message if isinstance(message, Welcome) else None)
        self.part = welcome.holds
        if welcome.bundle != self.bundle:
            raise ForeignBundle(f"{self.address}: the {self._peer} holds bundle {welcome.bundle.hex()}, expected {self.bundle.hex()}")
        check_socket_folder(self.address, create=False)  # again: it may have been made since
        if self._lane.possible:
            self._join_lane()
            if self._schema.serves:
                self._most_served()
        return welcome.groups

    def multiply(
        self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None], into: Tensor | None = None
    ) -> Tensor:
        """One exchange: masked rows c int32 [M, K] of a group -> z int32 [M, columns_out], parsed but unverified.

        Args:
            layer: name for statistics and errors.
            meanwhile: trusted work to do while the worker computes.
            into: dense int32 [M, columns_out], where z may be put.
        """
        z = torch.empty(c.shape[0], columns_out, dtype=torch.int32) if into is None else into
        payload = self.rows(layer, group, c, (Multiply, Product), z, meanwhile)
        return self.parsed(layer, lambda: require_residues(z) if payload is None else residues_of_frame(payload, *z.shape))

    def rows(
        self,
        layer: str,
        group: int,
        c: Tensor,
        kinds: tuple[Callable[[int, bytes, int, int], Any], type],
        out: Tensor,
        meanwhile: Callable[[], None],
    ) -> memoryview | None:
        """One exchange: masked rows c int32 [M, K] of a group go, and the answer's payload comes, unparsed.

        Args:
            layer: name for statistics and errors.
            kinds: the schema's request (id, bundle, group, rows), and its answer (id, rows).
            out: dense, as large as the payload.
            meanwhile: trusted work to do while the other side computes.

        Returns:
            None: it is in `out`; or else where it is, of whatever size.
        """
        self.show(layer, c)
        rows, own = c.shape[0], _OwnWork(meanwhile)
        if self._served(layer, group, c, out, own):
            return None
        asks, answers = kinds
        request = asks(self.next_id(), self.bundle, group, rows)

        def payload_of(message: Any, payload: memoryview | None) -> memoryview | None:
            return payload if isinstance(message, answers) and getattr(message, "rows", None) == rows else None

        # one row's memory is used again: a frame that leaves late, or twice, must not show what lies there then
        frame = residue_frame(c.clone() if rows == 1 else c)
        return self.exchange(layer, request, [frame], payload_of, own.do, expected=out.nbytes)

    def show(self, layer: str, c: Tensor) -> None:
        """Let the watcher, where there is one, see masked rows that are about to leave."""
        if self.watcher is not None:
            self.watcher(layer, c)

    def next_id(self) -> int:
        """The number of the next request."""
        return next(self._ids)

    def close(self) -> None:
        """Close the connection; later calls raise SessionClosed."""
        with self._lock:
            self._lane.leave()
            if not self._socket.closed:
                self._socket.disable_monitor()
                self._monitor.close(linger=0)
                self._socket.close(linger=0)
                if self._owns_context:
                    self._context.destroy(linger=0)

    def exchange(
        self,
        layer: str,
        request: Any,
        payload: list[Frame],
        parse: Callable[[Any, memoryview | None], _M | None],
        meanwhile: Callable[[], None] | None = None,
        expected: int | None = None,
    ) -> _M:
        """One exchange: a request of the schema, with at most one payload frame, -> what `parse` makes of the answer.

        Args:
            layer: name for statistics and errors.
            payload: the frame, in pieces.
            parse: the answer -> a result, or None where it is not an answer to this request.
            meanwhile: trusted work to do while the other side computes.
            expected: bytes of the answer's payload, at most; None: not known, or nothing that hurries.
        """
        if self._lane.wanted and expected is not None:
            self._join_lane()
        frames: list[Frame] = [self._schema.pack(request), *payload]  # as a lane takes them; the socket gets the payload in one
        size = sum(memoryview(frame).nbytes for frame in frames)
        record = LayerStatistics(exchanges=1, rows=getattr(request, "rows", 0))
        with self._lock:
            if self._socket.closed:
                raise SessionClosed(f"the connection to {self.address} is closed")
            started = time.monotonic()
            self._reconnected = False
            own, answer = _OwnWork(meanwhile), None
            if self._lane.carries(frames, expected):
                answer = self._through_lane(layer, request.id, frames, started, record, own)
            if answer is None:
                self._send(frames)
                own.do()
            while answer is None and (answer := self._receive(layer, request.id, started, record)) is None:
                if not self._reconnected:
                    raise self._silence(layer)
                self._reconnected = False
                if record.resent < _MOST_REPETITIONS:
                    logger.info("%s is back: the request is sent again, byte by byte", self.address)
                    self._send(frames)
                    record.resent += 1
            if self.simulated_rtt:
                _delay(self.simulated_rtt)
            record.seconds_waiting = time.monotonic() - own.done
            record.bytes_up = size * (1 + record.resent)
            record.seconds_round_trip = time.monotonic() - started
        self.telemetry.record(layer, record)
        message, answer_payload = answer
        if isinstance(message, ErrorAnswer):
            text = "".join(character for character in message.text if 32 <= ord(character) < 127)
            kind = _ERRORS.get(message.code, WorkerRefused)
            raise kind(f"{layer}: the {self._peer} at {self.address} answered '{message.code}': {text}")
        parsed = self.parsed(layer, lambda: parse(message, answer_payload))
        if parsed is None:
            raise WorkerRefused(f"{layer}: the {self._peer} answered something else than was asked")
        return parsed

    def parsed(self, layer: str, parse: Callable[[], _M]) -> _M:
        """What `parse` makes of an answer of the other side.

        Raises:
            WorkerRefused: the answer is malformed.
        """
        try:
            return parse()
        except MalformedMessage as error:
            raise WorkerRefused(f"{layer}: the {self._peer}'s answer is malformed: {error}") from error

    @property
    def _patience(self) -> float:
        return self.timeout if self._given_patience is None else self._given_patience

    def _send(self, frames: list[Frame]) -> None:
        """Queue the frames, the payload in one; where the queue to an absent worker is full, `_receive` queues them when there is room."""
        if len(frames) > MAX_FRAMES:
            frames = [frames[0], b"".join(frames[1:])]
        try:
            self._socket.send_multipart(frames, copy=False, flags=zmq.NOBLOCK)
            self._unsent = None
        except zmq.Again:
            self._unsent = frames
        self._poller.modify(self._socket, zmq.POLLIN if self._unsent is None else zmq.POLLIN | zmq.POLLOUT)

    def _receive(self, layer: str, request: int, started: float, record: LayerStatistics) -> tuple[Any, memoryview | None] | None:
        in_time, deadline = True, started + self.timeout
        if self._spin and self._unsent is None:
            self._look(min(deadline, time.monotonic() + self._spin))
        while in_time:
            left = min(deadline, math.inf if self._lost is None else max(self._lost, started) + self._patience) - time.monotonic()
            ready = dict(self._poller.poll(max(0, math.ceil(left * 1000))))
            in_time = bool(ready) and left > 0  # one look even when the time is up: the answer may have come during `meanwhile`
            if self._monitor in ready:
                self._watch(recv_monitor_message(self._monitor))
            if self._unsent is not None and ready.get(self._socket, 0) & zmq.POLLOUT:
                self._send(self._unsent)
            if not ready.get(self._socket, 0) & zmq.POLLIN:
                if self._reconnected:
                    return None
                continue
            answer = self._unpacked([frame.buffer for frame in self._socket.recv_multipart(copy=False)], layer, request, record)
            if answer is not None:
                return answer
        return None

    def _unpacked(self, frames: list[Any], layer: str, request: int, record: LayerStatistics) -> tuple[Any, memoryview | None] | None:
        """An answer to this request; None for an answer to another one."""
        record.bytes_down += sum(memoryview(frame).nbytes for frame in frames)
        try:
            message, payload = self._schema.unpack(frames)
        except MalformedMessage as error:
            if error.code == "version":
                raise WorkerRefused(
                    f"{layer}: the {self._peer} at {self.address} speaks another wire version ({error}): "
                    "install the same cloven on both sides"
                ) from error
            raise WorkerRefused(f"{layer}: the {self._peer}'s answer is malformed: {error}") from error
        if message.id == request or (isinstance(message, ErrorAnswer) and message.id == 0):
            return message, payload
        logger.info("dropped a late answer from %s", self.address)
        return None

    def _join_lane(self) -> None:
        """Ask for a lane, once for every connection; without one, the socket carries everything."""
        self._lane.wanted = False
        request = AskLane(self.next_id(), self.bundle)
        try:
            segment = self.exchange("lane", request, [], lambda message, _: message.segment if isinstance(message, Laned) else None)
            with self._lock:
                self._lane.take(segment)
                self._most = _UNKNOWN
        except (LaneGone, OSError, WorkerRefused) as error:
            logger.info("no lane to %s: %s", self.address, error)

    def _through_lane(
        self, layer: str, request: int, frames: list[Frame], started: float, record: LayerStatistics, own: _OwnWork
    ) -> tuple[Any, memoryview | None] | None:
        """An exchange through the lane; None where the other side has gone, and the frames go through the socket instead.

        Raises:
            WorkerTimeout: no answer in time; one that comes later finds nobody.
        """
        try:
            with self._lane.using() as lane:
                lane.send(frames)
                if own.pending:
                    lane.ring()
                own.do()
                answer = self._lane.answer(lane, started + self.timeout)
                if answer is None:
                    raise self._silence(layer)
                unpacked = self._unpacked(answer, layer, request, record)
                if unpacked is None:
                    raise LaneGone("an answer to something else")
                return unpacked
        except LaneGone as error:
            logger.info("the lane to %s is gone: %s", self.address, error)
            record.resent += 1
            return None

    def _served(self, layer: str, group: int, c: Tensor, out: Tensor, own: _OwnWork) -> bool:
        """An answer by a call without a header; False where there is none for it, or nothing came: then it needs a header."""
        rows, up, down, lane = c.shape[0], c.nbytes, out.nbytes, self._lane
        if lane.wanted or rows > self._most or not lane.fits_raw(up, down) or rows > self._most_served():
            return False  # a message with a header, for the number of rows, would end what is served: it is not asked for in vain
        sent, c = time.monotonic(), c.contiguous()
        with self._lock:
            if lane.generation != self._serving_at:
                return False
            try:
                if not lane.asked(group | rows << 32, c, out, own.do, sent + self.timeout):
                    raise self._silence(layer)
            except LaneGone as error:
                logger.info("the lane to %s is gone: %s", self.address, error)
                return False
            if self.simulated_rtt:
                _delay(self.simulated_rtt)
        done = time.monotonic()
        self.telemetry.record(layer, LayerStatistics(1, rows, up + PREFIX_BYTES, down, done - own.done, done - sent))
        return True

    def _most_served(self) -> int:
        """How many rows the other side answers without a header, over this lane and since the last message with one: it is asked."""
        if self._lane.generation < 0:
            return 0
        if self._lane.generation != self._serving_at:
            request = Serve(self.next_id(), self.bundle)
            self._most = self.exchange(
                "serve", request, [], lambda message, _: message.most if isinstance(message, Serving) else None, expected=0
            )
            self._serving_at = self._lane.generation
        return self._most

    @property
    def lane_generation(self) -> int:
        """See `LaneClient.generation`: a step that a message began lasts until the next message."""
        return self._lane.generation

    def raw(self, layer: str, generation: int, x: Tensor, out: Tensor) -> bool:
        """One call of a step, through the lane that began it: dense x goes, and out, dense, gets the answer.

        Args:
            generation: the lane's, when the step began.

        Returns:
            False where the step has ended, or its lane: nothing was asked, or nothing came.

        Raises:
            WorkerTimeout: no answer in time.
        """
        sent = time.monotonic()
        with self._lock:
            if generation < 0 or self._lane.generation != generation:
                return False
            try:
                with self._lane.using() as lane:
                    if not self._lane.raw(lane, x, out, sent + self.timeout):
                        raise self._silence(layer)
            except LaneGone as error:
                logger.info("the lane to %s is gone: %s", self.address, error)
                return False
            if self.simulated_rtt:
                _delay(self.simulated_rtt)
        seconds = time.monotonic() - sent
        self.telemetry.record(layer, LayerStatistics(1, x.shape[-2], x.nbytes, out.nbytes, seconds, seconds))
        return True

    def _look(self, until: float) -> None:
        """Wait for an answer without sleeping, not even for no time: that takes 50 µs."""
        while not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN and time.monotonic() < until:
            pass

    def _watch(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise PeerRefused(f"{self.address}: the {self._peer} refuses this key: put the public key in its allowed/ folder")
        if kind in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
            self._handshake_failures += 1
            final = kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL  # ZeroMQ does not try again after it
            if (final or self._handshake_failures >= 3) and not self._ever_connected:
                raise PeerRefused(
                    f"{self.address}: the peer ends the handshake: its key is not the pinned one, "
                    "only one side uses keys, or it admits nobody"
                )
        elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._reconnected = self._ever_connected
            self._lane.wanted = self._ever_connected and self._lane.possible
            self._connected = self._ever_connected = True
            self._lost = None
        elif kind == zmq.EVENT_DISCONNECTED:
            self._connected = False
            if self._lost is None:  # or a proxy that accepts and hangs up, again and again, would never be given up
                self._lost = time.monotonic()

    def _silence(self, layer: str) -> RunError:
        if self._connected:
            return WorkerTimeout(f"{layer}: no answer from the {self._peer} at {self.address} within {self.timeout:g} s")
        return WorkerUnreachable(
            f"{layer}: no {self._peer} at {self.address} for {min(self.timeout, self._patience):g} s: "
            f"is `cloven {self._peer}` running there, with its keys?"
        )
