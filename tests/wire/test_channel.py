"""The channel against workers that a test controls frame by frame; the real worker is in tests/worker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
from cloven.wire.channel import PLAIN_TCP_BANNER, Channel
from cloven.wire.messages import ErrorAnswer, Hello, Message, Multiply, Product, Welcome, pack, residue_frame, unpack
from tests.helpers import Context, FakeWorker, free_port, python_product, random_codes, random_residues

BUNDLE = bytes(range(16))
ADDRESS = "inproc://fake"
W = random_codes(3, 5)
C = random_residues(4, 5)
Z = python_product(C, W)
Answer = Callable[[Message], list[list[bytes]]]


def product(request: int, z: Tensor = Z) -> list[bytes]:
    return [pack(Product(request, z.shape[0])), bytes(residue_frame(z))]


class Session:
    """A channel to a fake worker on a shared context."""

    def __init__(self, context: Context, timeout: float = 5) -> None:
        self.context = context
        self.channel = Channel(ADDRESS, BUNDLE, timeout=timeout, context=context)

    def multiply(self, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        return self.channel.multiply("layer-7", 2, C, W.shape[0], meanwhile)


def fake(context: Context, answer: Answer) -> FakeWorker:
    return FakeWorker(context, ADDRESS, lambda frames: answer(unpack(list(frames))[0]))


@pytest.fixture
def session(context: Context) -> Iterator[Session]:
    session = Session(context)
    yield session
    session.channel.close()


@pytest.fixture
def hasty(context: Context) -> Iterator[Session]:
    """A session that waits 0.45 s at most, and asks again after 0.15 s."""
    session = Session(context, timeout=0.45)
    yield session
    session.channel.close()


def test_a_product(session: Session) -> None:
    with fake(session.context, lambda request: [product(request.id)]) as worker:
        assert torch.equal(session.multiply(), Z)
    request, payload = unpack(list(worker.received[0]))
    assert request == Multiply(request.id, BUNDLE, 2, 4)
    assert payload is not None and bytes(payload) == bytes(residue_frame(C))


def test_statistics_count_every_byte(session: Session) -> None:
    with fake(session.context, lambda request: [product(request.id)]) as worker:
        session.multiply()
        session.multiply()
    record = session.channel.telemetry.layers()["layer-7"]
    assert (record.exchanges, record.rows, record.resent) == (2, 8, 0)
    assert record.bytes_up == sum(len(frame) for frames in worker.received for frame in frames)
    assert record.bytes_down == sum(len(frame) for request in (1, 2) for frame in product(request))
    assert 0 < record.seconds_waiting < 5


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


def test_a_lost_answer_is_asked_again_with_identical_bytes(hasty: Session) -> None:
    swallowed: list[int] = []

    def answer(request: Message) -> list[list[bytes]]:
        if not swallowed:
            swallowed.append(request.id)
            return []
        return [product(request.id)]

    with fake(hasty.context, answer) as worker:
        assert torch.equal(hasty.multiply(), Z)
    assert len(worker.received) == 2
    assert worker.received[0] == worker.received[1]  # never another encoding under the same pads
    assert hasty.channel.telemetry.total().resent == 1


def test_silence_ends_in_time(hasty: Session) -> None:
    with fake(hasty.context, lambda _: []) as worker:
        started = time.monotonic()
        with pytest.raises(WorkerTimeout, match=r"layer-7: no answer .* within 0\.45 s"):
            hasty.multiply()
        assert 0.4 < time.monotonic() - started < 1.5
    assert len(worker.received) == 3
    assert worker.received[0] == worker.received[1] == worker.received[2]


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
    assert len(late) == 3
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
        assert time.monotonic() - started < 1.5


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
        lambda id: [msgpack.packb({"v": 2, "type": "product", "id": id, "rows": 4}), bytes(residue_frame(Z))],
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


def test_meanwhile_runs_once_while_the_worker_computes(hasty: Session) -> None:
    calls: list[int] = []
    asked = threading.Event()

    def answer(request: Message) -> list[list[bytes]]:
        first = not asked.is_set()
        asked.set()
        return [] if first else [product(request.id)]

    def meanwhile() -> None:
        assert asked.wait(2)  # the request is on its way before the trusted work begins
        calls.append(1)

    with fake(hasty.context, answer):
        assert torch.equal(hasty.multiply(meanwhile), Z)
    assert calls == [1]  # not again when the request is repeated


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
        assert time.monotonic() - started < 1.5
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
    socket: zmq.Socket[bytes] = session.channel._socket
    assert socket.linger == 0
    assert 0 < socket.maxmsgsize <= 65 * 2**20
    assert 0 < socket.sndhwm <= 16 and 0 < socket.rcvhwm <= 16
