"""Whatever a client sends: an error answer or silence, and the worker lives on, in bounded memory."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloven.wire.limits import MAX_PAYLOAD_BYTES
from cloven.wire.messages import Multiply, Product, pack, residue_frame, unpack
from cloven.wire.schema import ErrorAnswer, Hello, Welcome
from cloven.worker.service import Worker
from tests.helpers import Context, python_product, random_codes, random_residues, serving, write_exposed

W = random_codes(4, 16)
C = random_residues(2, 16)
Z = bytes(residue_frame(python_product(C, W)))
MOST_MEMORY = 200 * 2**20


class Client:
    """Sends anything, then a good request; a connection answers in order, so that nothing has to be waited for."""

    def __init__(self, context: Context, worker: Worker, address: str, bundle: bytes) -> None:
        self.context, self.worker, self.address, self.bundle = context, worker, address, bundle
        self.ids = itertools.count(2**40)
        self.socket = self.connect()

    def connect(self) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(self.address)
        return socket

    def send_and_go_on(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)
        request = next(self.ids)
        self.socket.send_multipart([pack(Multiply(request, self.bundle, 0, 2)), bytes(residue_frame(C))])
        for _ in range(2):
            assert self.socket.poll(10_000), "the worker is silent"
            message, payload = unpack(list(self.socket.recv_multipart()))
            if message.id == request:
                break
            assert isinstance(message, ErrorAnswer | Welcome | Product)
        assert message == Product(request, 2)
        assert payload is not None
        assert bytes(payload) == Z

    def still_answers(self) -> None:
        """On a new connection: the old one may have been cut off."""
        self.socket.close()
        self.socket = self.connect()
        self.socket.send(pack(Hello(1, self.bundle)))
        assert self.socket.poll(10_000), "the worker is silent"
        assert unpack(list(self.socket.recv_multipart()))[0] == Welcome(1, self.bundle, 1)


@pytest.fixture
def client(tmp_path: Path, socket_folder: Path, context: Context) -> Iterator[Client]:
    manifest = write_exposed(tmp_path / "exposed", [W])
    address = f"ipc://{socket_folder}/w"
    with serving(tmp_path / "exposed", address) as worker:
        client = Client(context, worker, address, bytes.fromhex(manifest.bundle))
        yield client
        client.socket.close()


KEYS = st.sampled_from(["v", "type", "id", "bundle", "group", "rows", "groups", "code", "text"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=20)
    | st.sampled_from([0, 1, 2, 2**63 - 1, "hello", "multiply", "welcome", "product", "error", "the bundle"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
SCHEMA = {
    "v": st.just(1) | VALUES,
    "type": st.sampled_from(["hello", "multiply", "product", "welcome", "error"]) | VALUES,
    "id": st.integers(0, 100) | VALUES,
    "bundle": st.just("the bundle") | VALUES,
}
HEADERS = st.fixed_dictionaries(SCHEMA, optional={"group": VALUES, "rows": VALUES, "extra": VALUES})
PAYLOADS = st.binary(max_size=80) | st.sampled_from([bytes(residue_frame(C)), bytes(128), b"\xff" * 128, b"\x7f" * 128, bytes(2**20)])
GARBAGE = st.lists(st.binary(max_size=200), min_size=1, max_size=4)
CUT = st.tuples(st.sampled_from(["hello", "multiply"]), st.integers(0, 60), st.integers(0, 255), st.booleans())


def fuzz(client: Client, examples: int) -> None:
    before = psutil.Process(os.getpid()).memory_info().rss

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(GARBAGE, CUT, st.tuples(HEADERS, st.lists(PAYLOADS, max_size=3)), st.integers(2, 400)))
    def attack(case: Any) -> None:
        if isinstance(case, int):
            client.send_and_go_on(*[b"x" * (case % 50)] * case)  # many frames
        elif isinstance(case, list):
            client.send_and_go_on(*case)
        elif isinstance(case[0], str):  # a good message, cut and changed
            kind, cut, flip, with_payload = case
            message = pack(Hello(3, client.bundle) if kind == "hello" else Multiply(3, client.bundle, 0, 2))
            changed = bytearray(message[: cut or None])
            changed[cut % len(changed)] ^= flip
            client.send_and_go_on(bytes(changed), *([bytes(residue_frame(C))] if with_payload else []))
        else:
            fields, payloads = case
            if fields["bundle"] == "the bundle":
                fields = {**fields, "bundle": client.bundle}
            client.send_and_go_on(msgpack.packb(fields), *payloads)

    attack()
    client.still_answers()
    assert psutil.Process(os.getpid()).memory_info().rss - before < MOST_MEMORY


def test_fuzz_short(client: Client) -> None:
    fuzz(client, 300)


@pytest.mark.long
def test_fuzz_long(client: Client) -> None:
    fuzz(client, 10_000)


def test_oversized_frames_cut_the_connection_not_the_worker(client: Client) -> None:
    before = psutil.Process(os.getpid()).memory_info().rss
    for _ in range(4):
        # this process holds the sender's copy as well
        client.socket.send_multipart([pack(Multiply(1, client.bundle, 0, 2)), bytes(MAX_PAYLOAD_BYTES + 4096)])
        client.still_answers()
    client.send_and_go_on(pack(Multiply(1, client.bundle, 0, 2)), bytes(MAX_PAYLOAD_BYTES // 4))
    assert psutil.Process(os.getpid()).memory_info().rss - before < MOST_MEMORY


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\xff" * 5000,
        bytes(5000),
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48),  # a good greeting, then nothing
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48) + b"\xff" * 3000,
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48) + b"\x06" + b"\x7f" + b"\xff" * 7,  # a command of 2^63 bytes
    ],
    ids=range(8),
)
def test_what_is_not_zeromq_at_all(client: Client, content: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(client.address.removeprefix("ipc://"))
        peer.sendall(content)
        client.still_answers()
    client.still_answers()
