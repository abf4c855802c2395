"""The channel against workers that a test controls frame by frame; the real worker is in tests/worker."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zmq
from torch import Tensor

from cloven.errors import (
    BadInput,
    ClovenError,
    ForeignBundle,
    PeerRefused,
    SecurityError,
    SessionClosed,
    WorkerRefused,
    WorkerTimeout,
    WorkerUnreachable,
)
from cloven.field.residues import H
from cloven.wire.channel import PLAIN_TCP_BANNER, Channel, _delay
from cloven.wire.messages import Message, Multiply, Product, pack, residue_frame, unpack
from cloven.wire.schema import ErrorAnswer, Hello, Welcome
from tests.helpers import Behaviour, Context, FakeWorker, free_port, python_product, random_codes, random_residues, serving, write_exposed

BUNDLE = bytes(range(16))
IN_TIME = 8.0  # seconds: far above every limit that is set here, for a busy machine, and far below what a hang would take
ADDRESS = "inproc://fake"
W = random_codes(3, 5)
C = random_residues(4, 5)
Z = python_product(C, W)
Answer = Callable[[Message], list[list[bytes]]]


def product(request: int, z: Tensor = Z) -> list[bytes]:
    return [pack(Product(request, z.shape[0])), bytes(residue_frame(z))]


class Session:
    """A channel to a fake worker on a shared context."""

    def __init__(self, context: Context, timeout: float = 5, spin: float = 0.0) -> None:
        self.context = context
        self.channel = Channel(ADDRESS, BUNDLE, timeout=timeout, context=context, spin=spin)

    def multiply(self, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        return self.channel.multiply("layer-7", 2, C, W.shape[0], meanwhile)


def fake(context: Context, answer: Answer) -> FakeWorker:
    return FakeWorker(context, ADDRESS, lambda frames: answer(unpack(list(frames))[0]))


SPINS = {"asleep": 0.0, "awake": 0.1}  # how the answer is waited for, which must change nothing


@pytest.fixture(params=SPINS.values(), ids=SPINS)
def session(context: Context, request: pytest.FixtureRequest) -> Iterator[Session]:
    session = Session(context, spin=request.param)
    yield session
    session.channel.close()


@pytest.fixture(params=SPINS.values(), ids=SPINS)
def hasty(context: Context, request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session that waits 0.45 s at most."""
    session = Session(context, timeout=0.45, spin=request.param)
    yield session
    session.channel.close()


def test_a_product(session: Session) -> None:
    with fake(session.context, lambda request: [product(request.id)]) as worker:
        assert torch.equal(session.multiply(), Z)
    request, payload = unpack(list(worker.received[0]))
    assert request == Multiply(request.id, BUNDLE, 2, 4)
    assert payload is not None and bytes(payload) == bytes(residue_frame(C))


def test_a_frame_of_one_row_outlives_its_call_unchanged(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """zmq may send it again, or for the first time, when the caller's memory is used for something else."""
    wide, kept = random_residues(1, 20_000, 3), list[Any]()
    before, send = wide.clone(), session.channel._send
    monkeypatch.setattr(session.channel, "_send", lambda frames: (kept.append(frames), send(frames))[1])
    with fake(session.context, lambda request: [product(request.id, Z[:1])]):
        session.channel.multiply("layer-7", 2, wide, W.shape[0], lambda: None)
    wide.fill_(7)
    assert bytes(kept[-1][-1]) == bytes(residue_frame(before))


def test_a_watcher_is_shown_what_leaves(session: Session) -> None:
    shown: list[tuple[str, Tensor]] = []
    with fake(session.context, lambda request: [product(request.id)]) as worker:
        session.multiply()
        session.channel.watcher = lambda layer, c: shown.append((layer, c))
        assert torch.equal(session.multiply(), Z)
        session.channel.watcher = None
        session.multiply()
    ((layer, c),) = shown
    assert layer == "layer-7" and bytes(residue_frame(c)) == worker.received[1][1]


def test_statistics_count_every_byte(session: Session) -> None:
    with fake(session.context, lambda request: [product(request.id)]) as worker:
        session.multiply()
        session.multiply()
    record = session.channel.telemetry.layers()["layer-7"]
    assert (record.exchanges, record.rows, record.resent) == (2, 8, 0)
    assert record.bytes_up == sum(len(frame) for frames in worker.received for frame in frames)
    assert record.bytes_down == sum(len(frame) for request in (1, 2) for frame in product(request))
    assert 0 < record.seconds_waiting < 5


def test_a_simulated_round_trip(context: Context) -> None:
    """It lengthens every exchange, is counted as waiting, may change between exchanges, and is not taken from the timeout."""
    rtt, count = 0.08, 5
    channel = Channel(ADDRESS, BUNDLE, timeout=rtt / 2, context=context, simulated_rtt=rtt)
    spent = []
    with fake(context, lambda request: [product(request.id)]):
        for channel.simulated_rtt in (rtt, 0.0):
            channel.telemetry.reset()
            started = time.monotonic()
            for _ in range(count):
                assert torch.equal(channel.multiply("layer-7", 2, C, W.shape[0], lambda: None), Z)
            total = channel.telemetry.total()
            spent.append((time.monotonic() - started, total.seconds_waiting, total.seconds_round_trip))
    channel.close()
    for with_it, without in zip(*spent, strict=True):
        assert 0.9 < (with_it - without) / (count * rtt) < 2  # once, not twice; a busy machine adds to it


@pytest.mark.parametrize("seconds", [1e-4, 2e-3])
def test_short_delays_are_exact(seconds: float) -> None:
    """A sleep alone ends a tenth of a millisecond late. The best of some tries: the machine may be busy."""
    taken = []
    for _ in range(200):
        started = time.monotonic()
        _delay(seconds)
        taken.append(time.monotonic() - started)
    assert seconds <= min(taken) < 1.1 * seconds


@pytest.mark.parametrize("seconds", [-0.001, float("nan"), float("inf"), 60.0])
def test_impossible_round_trips(context: Context, seconds: float) -> None:
    with pytest.raises(BadInput, match="simulated round trip"):
        Channel(ADDRESS, BUNDLE, context=context, simulated_rtt=seconds)


def test_hello(session: Session) -> None:
    with fake(session.context, lambda request: [[pack(Welcome(request.id, BUNDLE, 29))]]) as worker:
        assert session.channel.hello() == 29
    assert unpack(list(worker.received[0]))[0] == Hello(1, BUNDLE)


def test_another_bundle(session: Session) -> None:
    with (
        fake(session.context, lambda request: [[pack(Welcome(request.id, bytes(16), 29))]]),
        pytest.raises(ForeignBundle, match="00000000"),
    ):
        session.channel.hello()


class Flaky:
    """A worker that takes the first request and dies with it, and comes back to answer."""

    def __init__(self, context: Context, folder: Path, reply: Behaviour) -> None:
        self.context, self.address, self.reply = context, f"ipc://{folder}/w", reply
        self.took = threading.Event()
        self.received: list[list[bytes]] = []
        self._thread = threading.Thread(target=self._run)
        self._done = threading.Event()

    def __enter__(self) -> Flaky:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(10)

    def _swallow(self, _frames: list[bytes]) -> list[list[bytes]]:
        self.took.set()
        return []

    def _run(self) -> None:
        with FakeWorker(self.context, self.address, self._swallow) as dying:
            self.took.wait(5)
        with FakeWorker(self.context, self.address, self.reply) as risen:
            self._done.wait(10)
        self.received = dying.received + risen.received


def test_a_request_lost_with_its_connection_is_sent_again_with_identical_bytes(context: Context, socket_folder: Path) -> None:
    calls: list[int] = []
    with Flaky(context, socket_folder, lambda frames: [product(unpack(list(frames))[0].id)]) as worker:
        channel = Channel(worker.address, BUNDLE, timeout=5)
        try:
            z = channel.multiply("layer-7", 2, C, W.shape[0], lambda: calls.append(1))
        finally:
            channel.close()
    assert torch.equal(z, Z)
    assert len(worker.received) == 2
    assert worker.received[0] == worker.received[1]  # never another encoding under the same pads
    assert calls == [1]  # the trusted work is not done again
    record = channel.telemetry.total()
    assert record.resent == 1
    assert record.bytes_up == 2 * sum(map(len, worker.received[0]))


def test_a_worker_that_comes_late_gets_a_request_that_found_the_queue_full(context: Context, socket_folder: Path) -> None:
    # requests that timed out wait in the queue to the absent worker, up to its mark; the next one must not be dropped without a word
    channel = Channel(f"ipc://{socket_folder}/w", BUNDLE, timeout=0.02)
    try:
        for _ in range(10):
            with pytest.raises(WorkerUnreachable):
                channel.hello()
        channel.timeout = 5
        with FakeWorker(context, f"ipc://{socket_folder}/w", lambda frames: [[pack(Welcome(unpack(list(frames))[0].id, BUNDLE, 3))]]):
            assert channel.hello() == 3
    finally:
        channel.close()


def test_silence_ends_in_time(hasty: Session) -> None:
    with fake(hasty.context, lambda _: []) as worker:
        started = time.monotonic()
        with pytest.raises(WorkerTimeout, match=r"layer-7: no answer .* within 0\.45 s"):
            hasty.multiply()
        assert 0.4 < time.monotonic() - started < IN_TIME
    assert len(worker.received) == 1  # a slow worker is not given the same work twice


def test_late_answers_are_dropped(hasty: Session) -> None:
    late: list[list[bytes]] = []

    def answer(request: Message) -> list[list[bytes]]:
        if request.id == 1:
            late.append(product(1, -Z))
            return []
        return [*late, product(request.id)]

    with fake(hasty.context, answer) as worker:
        with pytest.raises(WorkerTimeout):
            hasty.multiply()
        assert torch.equal(hasty.multiply(), Z)
    assert len(late) == 1
    assert unpack(list(worker.received[-1]))[0].id == 2


def test_repeated_answers_are_dropped(session: Session) -> None:
    with fake(session.context, lambda request: [product(request.id, Z if request.id == 1 else -Z)] * 3):
        assert torch.equal(session.multiply(), Z)
        assert torch.equal(session.multiply(), -Z)  # the copies of answer 1 came first


def test_answers_to_other_requests_do_not_count(hasty: Session) -> None:
    with (
        fake(hasty.context, lambda request: [product(request.id + 1), product(request.id - 1), product(2**63 - 1)]),
        pytest.raises(WorkerTimeout),
    ):
        hasty.multiply()


def test_a_stream_of_other_answers_does_not_stretch_the_time(hasty: Session) -> None:
    with fake(hasty.context, lambda _: [product(99)] * 2000):
        started = time.monotonic()
        with pytest.raises(WorkerTimeout):
            hasty.multiply()
        assert time.monotonic() - started < IN_TIME


@pytest.mark.parametrize(
    "answer",
    [
        lambda id: [pack(Welcome(id, BUNDLE, 1))],
        lambda id: [pack(Hello(id, BUNDLE))],
        lambda id: [pack(Multiply(id, BUNDLE, 2, 4)), bytes(residue_frame(Z))],
        lambda id: product(id, Z[:3]),
        lambda id: product(id, torch.cat([Z, Z])),
        lambda id: [pack(Product(id, 4)), bytes(residue_frame(Z))[:-1]],
        lambda id: [pack(Product(id, 4)), bytes(residue_frame(Z)) + b"\x00\x00\x00\x00"],
        lambda id: [pack(Product(id, 4)), b""],
        lambda id: [pack(Product(id, 4))],
        lambda id: [pack(Product(id, 4)), bytes(residue_frame(Z)), b"more"],
        lambda id: product(id, torch.full_like(Z, H + 1)),
        lambda id: product(id, torch.full_like(Z, -(2**31))),
        lambda id: [msgpack.packb({"v": 1, "type": "product", "id": id, "rows": 4}), bytes(residue_frame(Z))],
        lambda _: [b"garbage"],
        lambda _: [b""],
        lambda _: [b"\xc1" * 2000],
    ],
)
def test_answers_that_are_none(session: Session, answer: Callable[[int], list[bytes]]) -> None:
    with fake(session.context, lambda request: [answer(request.id)]), pytest.raises(WorkerRefused, match="layer-7"):
        session.multiply()


@pytest.mark.parametrize("request_id", [True, False])
def test_error_answers(session: Session, request_id: bool) -> None:
    # id 0: the worker could not read which request it was
    with (
        fake(session.context, lambda request: [[pack(ErrorAnswer(request.id if request_id else 0, "group", "no group 2"))]]),
        pytest.raises(WorkerRefused, match=r"layer-7: .* answered 'group': no group 2"),
    ):
        session.multiply()


def test_error_of_another_bundle_is_a_security_error(session: Session) -> None:
    with fake(session.context, lambda request: [[pack(ErrorAnswer(request.id, "bundle", "I hold another"))]]), pytest.raises(SecurityError):
        session.multiply()


def test_error_texts_cannot_drive_the_terminal(session: Session) -> None:
    text = "\x1b[2J\x1b]0;owned\x07\r\nroot# \x9b31m\u202e\x00ok"
    with fake(session.context, lambda request: [[pack(ErrorAnswer(request.id, "internal", text))]]), pytest.raises(WorkerRefused) as caught:
        session.multiply()
    assert all(32 <= ord(character) < 127 for character in str(caught.value))
    assert str(caught.value).endswith("ok")


def test_the_request_is_on_its_way_before_the_trusted_work_begins(session: Session) -> None:
    asked = threading.Event()
    calls: list[bool] = []

    def answer(request: Message) -> list[list[bytes]]:
        asked.set()
        return [product(request.id)]

    with fake(session.context, answer):
        assert torch.equal(session.multiply(lambda: calls.append(asked.wait(2))), Z)
    assert calls == [True]


def test_an_answer_that_came_during_long_trusted_work_is_used(hasty: Session) -> None:
    # the worker was quick; it is the trusted side that took longer than the timeout
    with fake(hasty.context, lambda request: [product(request.id)]) as worker:
        assert torch.equal(hasty.multiply(lambda: time.sleep(0.6)), Z)
    assert len(worker.received) == 1


def test_an_error_in_the_trusted_work_leaves_a_usable_channel(session: Session) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with fake(session.context, lambda request: [product(request.id, -Z if request.id == 1 else Z)]):
        with pytest.raises(ZeroDivisionError):
            session.multiply(fail)
        assert torch.equal(session.multiply(), Z)


def test_one_exchange_at_a_time(session: Session) -> None:
    results: list[bool] = []

    def call(seed: int) -> None:
        c = random_residues(2, 5, seed)
        results.append(torch.equal(session.channel.multiply("layer", 0, c, 3, lambda: None), python_product(c, W)))

    def answer(frames: list[bytes]) -> list[list[bytes]]:
        request, payload = unpack(list(frames))
        assert payload is not None
        c = torch.frombuffer(bytearray(payload), dtype=torch.int32).view(2, 5)
        return [product(request.id, python_product(c, W))]

    with FakeWorker(session.context, ADDRESS, answer):
        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert results == [True] * 8


def test_closed(session: Session) -> None:
    session.channel.close()
    session.channel.close()
    with pytest.raises(SessionClosed):
        session.multiply()


def test_nobody_there(socket_folder: Path) -> None:
    channel = Channel(f"ipc://{socket_folder}/w", BUNDLE, timeout=0.3)
    try:
        started = time.monotonic()
        with pytest.raises(WorkerUnreachable, match="is `cloven worker` running"):
            channel.hello()
        assert time.monotonic() - started < IN_TIME
    finally:
        channel.close()


def test_a_worker_that_dies_and_comes_back(socket_folder: Path, context: Context) -> None:
    address = f"ipc://{socket_folder}/w"
    channel = Channel(address, BUNDLE, timeout=0.3)

    def call() -> Tensor:
        return channel.multiply("layer-7", 2, C, W.shape[0], lambda: None)

    def answer(frames: list[bytes]) -> list[list[bytes]]:
        return [product(unpack(list(frames))[0].id)]

    try:
        with FakeWorker(context, address, answer):
            assert torch.equal(call(), Z)
        with pytest.raises((WorkerUnreachable, WorkerTimeout)):
            call()
        with FakeWorker(context, address, answer):
            channel.timeout = 5
            assert torch.equal(call(), Z)  # without anybody's help
    finally:
        channel.close()


def test_plain_tcp_needs_the_insecure_option(caplog: pytest.LogCaptureFixture) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(BadInput, match="cloven keygen"):
        Channel(address, BUNDLE)
    with caplog.at_level(logging.WARNING, "cloven"):
        Channel(address, BUNDLE, insecure_plain_tcp=True).close()
    assert PLAIN_TCP_BANNER in caplog.text


@pytest.mark.parametrize("timeout", [0, -1, 10**6, float("nan")])
def test_timeouts_out_of_range(timeout: float) -> None:
    with pytest.raises(BadInput, match="timeout"):
        Channel(ADDRESS, BUNDLE, timeout=timeout)


@pytest.mark.parametrize("address", ["tcp://*:5555", "nonsense"])
def test_addresses_one_cannot_connect_to(address: str) -> None:
    with pytest.raises(ClovenError):
        Channel(address, BUNDLE, insecure_plain_tcp=True).close()


def test_a_folder_that_others_can_reach_is_refused(socket_folder: Path) -> None:
    socket_folder.chmod(0o755)
    with pytest.raises(PeerRefused, match="0700"):
        Channel(f"ipc://{socket_folder}/w", BUNDLE)


def test_the_socket_is_bounded(session: Session) -> None:
    inner: zmq.Socket[bytes] = session.channel._socket
    assert inner.linger == 0
    assert 0 < inner.maxmsgsize <= 65 * 2**20
    assert 0 < inner.sndhwm <= 16 and 0 < inner.rcvhwm <= 16


class SlowLink:
    """A tcp proxy that lets answers through at `rate` bytes per second."""

    def __init__(self, port: int, rate: float) -> None:
        self._port, self._rate = port, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self.connections = 0

    def __enter__(self) -> str:
        self._threads[0].start()
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in self._open:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._port))
                self._open += [client, server]
                for source, target, rate in ((client, server, 0.0), (server, client, self._rate)):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, target, rate)))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket, rate: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
            target.shutdown(socket.SHUT_RDWR)


@pytest.mark.long
def test_a_large_answer_over_a_slow_link(tmp_path: Path) -> None:
    # 32 MiB in under four of six seconds: heartbeats must not take a connection for dead while an answer is arriving on it
    codes, c = random_codes(4096, 2), random_residues(2048, 2)
    manifest = write_exposed(tmp_path / "exposed", [codes])
    port = free_port()
    link = SlowLink(port, 9e6)
    with serving(tmp_path / "exposed", f"tcp://127.0.0.1:{port}", insecure_plain_tcp=True), link as address:
        channel = Channel(address, bytes.fromhex(manifest.bundle), timeout=6, insecure_plain_tcp=True)
        try:
            z = channel.multiply("layer", 0, c, 4096, lambda: None)
        finally:
            channel.close()
    assert torch.equal(z[:2, :50], python_product(c[:2], codes[:50]))
    assert link.connections == 1


# --- patience: how long a lost connection may take to come back, where there is somebody else to ask


def welcome(frames: list[bytes]) -> list[list[bytes]]:
    return [[pack(Welcome(unpack(list(frames))[0].id, BUNDLE, 3))]]


def answers(frames: list[bytes]) -> list[list[bytes]]:
    return [product(unpack(list(frames))[0].id)]


@contextlib.contextmanager
def opened(address: str, **options: Any) -> Iterator[Channel]:
    channel = Channel(address, BUNDLE, **options)
    try:
        yield channel
    finally:
        channel.close()


def asked(channel: Channel) -> Tensor:
    return channel.multiply("layer-7", 2, C, W.shape[0], lambda: None)


def test_a_lost_connection_is_given_up_after_patience_and_not_before(context: Context, socket_folder: Path) -> None:
    address = f"ipc://{socket_folder}/w"
    with opened(address, timeout=20, patience=0.5) as channel:
        with FakeWorker(context, address, welcome):
            channel.hello()
        for _ in range(2):  # every exchange has the same patience, whenever the connection was lost
            started = time.monotonic()
            with pytest.raises(WorkerUnreachable, match=r"layer-7: no worker at .* for 0\.5 s: is `cloven worker` running"):
                asked(channel)
            assert 0.45 < time.monotonic() - started < IN_TIME
        with FakeWorker(context, address, answers):  # it comes back later: found again, without anybody's help
            time.sleep(0.3)
            assert torch.equal(asked(channel), Z)


def test_nobody_there_is_given_up_after_patience(socket_folder: Path) -> None:
    with opened(f"ipc://{socket_folder}/w", timeout=20, patience=0.3) as channel:
        started = time.monotonic()
        with pytest.raises(WorkerUnreachable, match=r"for 0\.3 s"):
            channel.hello()
        assert 0.25 < time.monotonic() - started < IN_TIME


def test_without_patience_the_timeout_holds(context: Context, socket_folder: Path) -> None:
    address = f"ipc://{socket_folder}/w"
    with opened(address, timeout=1.2) as channel:
        with FakeWorker(context, address, welcome):
            channel.hello()
        started = time.monotonic()
        with pytest.raises(WorkerUnreachable, match=r"for 1\.2 s"):
            asked(channel)
        assert 1.1 < time.monotonic() - started < IN_TIME


def test_more_patience_than_time(socket_folder: Path) -> None:
    with opened(f"ipc://{socket_folder}/w", timeout=0.3, patience=50.0) as channel:
        started = time.monotonic()
        with pytest.raises(WorkerUnreachable, match=r"for 0\.3 s"):
            channel.hello()
        assert time.monotonic() - started < IN_TIME


def test_patience_is_not_for_slow_answers(context: Context) -> None:
    """While there is a connection, the timeout holds."""

    def slowly(frames: list[bytes]) -> list[list[bytes]]:
        time.sleep(0.4)
        return answers(frames)

    with FakeWorker(context, ADDRESS, slowly), opened(ADDRESS, timeout=10, patience=0.05, context=context) as channel:
        assert torch.equal(asked(channel), Z)


def test_a_reconnection_within_patience(context: Context, socket_folder: Path) -> None:
    """The identical bytes are sent again, and nothing is given up."""
    with (
        Flaky(context, socket_folder, lambda frames: [product(unpack(list(frames))[0].id)]) as worker,
        opened(worker.address, timeout=20, patience=5.0) as channel,
    ):
        assert torch.equal(asked(channel), Z)
        assert channel.telemetry.total().resent == 1
    assert len(worker.received) == 2 and worker.received[0] == worker.received[1]


def listening(port: int) -> socket.socket:
    """A listener there, as soon as the one before it is gone: libzmq closes its own in the background."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def test_a_proxy_that_accepts_and_hangs_up(context: Context) -> None:
    """As a load balancer or a tunnel does in front of a dead worker: every new connection is lost at once, and none is a return."""
    port, stopping, hung_up = free_port(), threading.Event(), [0]
    address = f"tcp://127.0.0.1:{port}"

    def hang_up() -> None:
        with listening(port) as listener:
            listener.settimeout(0.05)
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    listener.accept()[0].close()
                    hung_up[0] += 1

    proxy = threading.Thread(target=hang_up)
    with opened(address, timeout=10, patience=1.0, insecure_plain_tcp=True) as channel:
        with FakeWorker(context, address, welcome):
            channel.hello()
        proxy.start()
        try:
            started = time.monotonic()
            with pytest.raises(WorkerUnreachable, match=r"for 1 s"):
                asked(channel)
            assert time.monotonic() - started < 9.0 and hung_up[0] >= 2
        finally:
            stopping.set()
            proxy.join()


SILENT = """
import sys, zmq
router = zmq.Context().socket(zmq.ROUTER)
router.bind(sys.argv[1])
print(flush=True)
while router.recv_multipart():
    print(flush=True)
"""


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_dead_process_is_noticed_quickly(transport: str, socket_folder: Path) -> None:
    """SIGKILL while it computes: the kernel closes its connections, long before the timeout."""
    address = f"ipc://{socket_folder}/w" if transport == "ipc" else f"tcp://127.0.0.1:{free_port()}"
    with (
        subprocess.Popen([sys.executable, "-c", SILENT, address], stdout=subprocess.PIPE) as process,
        opened(address, timeout=30, patience=0.3, insecure_plain_tcp=True) as channel,
    ):
        assert process.stdout is not None and process.stdout.readline()
        killed: list[float] = []

        def kill() -> None:
            assert process.stdout is not None and process.stdout.readline()  # it has the request
            process.kill()
            process.wait()
            killed.append(time.monotonic())

        with pytest.raises(WorkerUnreachable):
            channel.multiply("layer-7", 2, C, W.shape[0], kill)
        assert 0.25 < time.monotonic() - killed[0] < IN_TIME


def test_what_the_worker_says_that_it_holds(context: Context) -> None:
    def answer(frames: list[bytes]) -> list[list[bytes]]:
        return [[pack(Welcome(unpack(list(frames))[0].id, BUNDLE, 29, "rows:2/3"))]]

    with FakeWorker(context, ADDRESS, answer), opened(ADDRESS, timeout=5, context=context) as channel:
        assert channel.part == ""
        assert channel.hello() == 29 and channel.part == "rows:2/3"


@pytest.mark.parametrize("holds", ["everything", "rows:0/2", "layers:1/2 ", 7, None, b"", "rows:1/2" * 100])
def test_a_worker_that_holds_nonsense(context: Context, holds: Any) -> None:
    fields = {"v": 5, "type": "welcome", "bundle": BUNDLE, "groups": 3, "holds": holds}

    def answer(frames: list[bytes]) -> list[list[bytes]]:
        return [[msgpack.packb({**fields, "id": unpack(list(frames))[0].id})]]

    with (
        FakeWorker(context, ADDRESS, answer),
        opened(ADDRESS, timeout=5, context=context) as channel,
        pytest.raises(WorkerRefused, match="malformed"),
    ):
        channel.hello()


@pytest.mark.parametrize("version", [1, 2, 0, "3", None])
def test_another_wire_version_is_named(context: Context, version: Any) -> None:
    def answer(frames: list[bytes]) -> list[list[bytes]]:
        return [[msgpack.packb({"v": version, "type": "error", "id": 0, "code": "version", "text": "I am old"})]]

    with FakeWorker(context, ADDRESS, answer), opened(ADDRESS, timeout=5, context=context) as channel:
        started = time.monotonic()
        with pytest.raises(WorkerRefused, match=r"another wire version \(this side speaks wire version 5 only\): install the same cloven"):
            channel.hello()
        assert time.monotonic() - started < 4  # the timeout is 5
