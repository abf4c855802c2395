"""A server of a made-up scheme; `tests/worker/test_service.py` has addresses, keys and restarts."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from zmq.utils import z85

from cloven.errors import BadInput
from cloven.wire.keys import TrustedKeys, WorkerKeys, generate_keys, trusted_keys, worker_keys
from cloven.wire.schema import ErrorAnswer, Hello, MalformedMessage, Welcome
from cloven.wire.server import Frame, Server
from tests.helpers import Context, free_port
from tests.split_models import run_python
from tests.wire.test_schema import BUNDLE, COLOURS, Ask, Tell


class Colours(Server):
    """Tells what it is asked, and notes by whom."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__("painter", address, COLOURS, **options)
        self.peers: list[str] = []
        self.bind()

    def answer(self, frames: list[Any], peer: str) -> list[Frame]:
        message, _ = COLOURS.unpack(frames)
        self.peers.append(peer)
        if isinstance(message, Hello):
            return [COLOURS.pack(Welcome(message.id, message.bundle, 1))]
        if not isinstance(message, Ask):
            raise MalformedMessage("malformed", "not a question", message.id)
        if message.colour == "red":
            raise RuntimeError("the secret number is 1234")
        return [COLOURS.pack(Tell(message.id, message.colour)), b"sky"]


@contextlib.contextmanager
def serving(address: str, **options: Any) -> Iterator[Colours]:
    server = Colours(address, **options)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


def ask(context: Context, address: str, *messages: list[bytes], keys: TrustedKeys | None = None) -> list[list[bytes]]:
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = keys.own.public, keys.own.secret, keys.worker
    socket.connect(address)
    answers = []
    for frames in messages:
        socket.send_multipart(frames)
        assert socket.poll(10_000), "the server is silent"
        answers.append(list(socket.recv_multipart()))
    socket.close()
    return answers


BLUE, RED = [COLOURS.pack(Ask(1, "blue"))], [COLOURS.pack(Ask(2, "red"))]


def test_answers_and_refusals(context: Context) -> None:
    with serving("inproc://s", context=context) as server:
        answers = ask(context, "inproc://s", BLUE, [b"garbage"], [COLOURS.pack(Tell(3, "blue")), b"x"], BLUE)
        assert COLOURS.unpack(answers[0])[0] == Tell(1, "blue") and answers[0] == answers[3]
        errors = [COLOURS.unpack(answer)[0] for answer in answers[1:3]]
        assert [(error.id, error.code) for error in errors] == [(0, "malformed"), (3, "malformed")]
        assert (server.answered, server.refused) == (2, 2)


def test_a_failure_inside_tells_nothing_and_the_server_lives(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    with serving("inproc://s", context=context):
        answers = ask(context, "inproc://s", RED, BLUE)
        error = COLOURS.unpack(answers[0])[0]
        assert isinstance(error, ErrorAnswer) and error.code == "internal" and "painter" in error.text and "1234" not in error.text
        assert COLOURS.unpack(answers[1])[0] == Tell(1, "blue")
    assert "a request failed" in caplog.text


def test_who_asks_over_ipc(context: Context, socket_folder: Path) -> None:
    with serving(f"ipc://{socket_folder}/s") as server:
        ask(context, f"ipc://{socket_folder}/s", BLUE)
        assert server.peers == ["local"]


def test_who_asks_over_inproc(context: Context) -> None:
    with serving("inproc://s", context=context) as server:
        ask(context, "inproc://s", BLUE)
        assert server.peers == [""]


def two_clients(tmp_path: Path) -> tuple[WorkerKeys, list[TrustedKeys]]:
    """A server's keys that allow two clients, each with keys of its own."""
    for name in ("one", "two"):
        generate_keys(tmp_path / name)
    shutil.copy(tmp_path / "two" / "worker" / "allowed" / "trusted.json", tmp_path / "one" / "worker" / "allowed" / "two.json")
    server = worker_keys(tmp_path / "one")
    return server, [TrustedKeys(trusted_keys(tmp_path / name).own, server.own.public) for name in ("one", "two")]


def test_who_asks_over_curve(context: Context, tmp_path: Path) -> None:
    """Two clients with keys of their own are two peers; the name is the public key, whatever the connection."""
    keys, clients = two_clients(tmp_path)
    address = f"tcp://127.0.0.1:{free_port()}"
    with serving(address, keys=keys) as server:
        for client in (*clients, clients[0]):
            ask(context, address, BLUE, keys=client)
        names = [z85.decode(client.own.public).hex() for client in clients]
        assert server.peers == [*names, names[0]]


CLAIMS = """
import sys, threading
import zmq
from cloven.wire.messages import WORKER
from cloven.wire.schema import MalformedMessage
from cloven.wire.server import Server

class Deaf(Server):
    def answer(self, frames, peer):
        raise MalformedMessage("malformed", "what?")

server = Deaf("worker", sys.argv[1], WORKER)
server.bind()
threading.Thread(target=server.serve, daemon=True).start()
context = zmq.Context()

def connect(claim=None):
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if claim is not None:
        socket.setsockopt(zmq.ROUTING_ID, bytes([0]) + claim.to_bytes(4, "big"))
    socket.connect(sys.argv[1])
    socket.send(b"hello")
    assert socket.poll(5000), "the server is silent"
    return socket

claimed = [connect(0x6B8B4567 + number) for number in range(16)]  # glibc's first number without a seed, and those that follow it
honest = [connect() for _ in range(3)]
print("alive")
"""


def test_nobody_knows_the_number_of_the_next_peer(socket_folder: Path) -> None:
    """libzmq aborts the process where a peer has claimed it: a process of its own."""
    done = run_python(CLAIMS, f"ipc://{socket_folder}/s")
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr


def test_tcp_needs_keys() -> None:
    with pytest.raises(BadInput, match="tcp needs keys"):
        Colours(f"tcp://127.0.0.1:{free_port()}")


def test_the_banner_names_the_server(caplog: pytest.LogCaptureFixture) -> None:
    Colours(f"tcp://127.0.0.1:{free_port()}", insecure_plain_tcp=True).close()
    assert "INSECURE: this painter listens on plain tcp" in caplog.text


def test_a_server_that_is_not_bound_does_not_serve(context: Context) -> None:
    class Unbound(Server):
        """Forgets to."""

        def answer(self, frames: list[Any], peer: str) -> list[Frame]:
            return []

    with pytest.raises(AssertionError, match="bind comes first"):
        Unbound("x", "inproc://x", COLOURS, context=context).serve()


def test_stop_before_serve(context: Context) -> None:
    server = Colours("inproc://s", context=context)
    server.stop()
    server.serve()
    assert server._socket is not None and server._socket.closed
    server.close()


def test_a_hello_of_any_bundle_reaches_the_scheme(context: Context) -> None:
    with serving("inproc://s", context=context):
        assert COLOURS.unpack(ask(context, "inproc://s", [COLOURS.pack(Hello(1, BUNDLE))])[0])[0] == Welcome(1, BUNDLE, 1)
        assert COLOURS.unpack(ask(context, "inproc://s", [msgpack.packb({"v": 9})])[0])[0].code == "version"


# --- counts


def published(server: Server) -> dict[tuple[str, ...], float]:
    return {(sample.name.removeprefix("cloven_"), *sample.labels): sample.value for sample in server.samples()}


def test_what_is_published(context: Context) -> None:
    with serving("inproc://s", context=context) as server:
        garbage, told = [b"garbage"], [COLOURS.pack(Tell(3, "blue")), b"x"]
        answers = ask(context, "inproc://s", BLUE, garbage, told, BLUE, RED)
        found = published(server)
    sizes = [sum(map(len, frames)) for frames in (BLUE, garbage, told, BLUE, RED)]
    assert found["exchanges_total", "socket"] == 2 and found["exchanges_total", "lane"] == found["exchanges_total", "native"] == 0
    assert found["received_bytes_total", "socket"] == sum(sizes)
    assert found["sent_bytes_total", "socket"] == sum(len(frame) for answer in answers for frame in answer)
    assert (found["refused_total", "malformed"], found["refused_total", "internal"]) == (2, 1)
    assert 0 < found["work_seconds_total", "socket"] < 60 and found["waiting_requests",] == 0
    assert found["hellos_total",] == 0 and ("connections",) not in found  # nobody is asked over inproc


def test_connections_are_counted(context: Context, socket_folder: Path) -> None:
    with serving(f"ipc://{socket_folder}/s") as server:
        sockets = []
        for _ in range(3):
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            socket.connect(f"ipc://{socket_folder}/s")
            socket.send_multipart(BLUE)
            assert socket.poll(10_000)
            sockets.append(socket)
        assert published(server)["connections",] == 3 and published(server)["connections_refused_total",] == 0
        for socket in sockets:
            socket.close()
        deadline = time.monotonic() + 5
        while published(server)["connections",] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert published(server)["connections",] == 0


def test_refused_connections_are_counted(context: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, (client, _) = two_clients(tmp_path)
    generate_keys(tmp_path / "stranger")
    stranger = TrustedKeys(trusted_keys(tmp_path / "stranger").own, client.worker)
    address = f"tcp://127.0.0.1:{free_port()}"
    with caplog.at_level(logging.INFO, "cloven"), serving(address, keys=keys) as server:
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = stranger.own.public, stranger.own.secret, stranger.worker
        socket.connect(address)
        deadline = time.monotonic() + 10
        while not published(server)["connections_refused_total",] and time.monotonic() < deadline:
            time.sleep(0.02)
        socket.close()
        assert published(server)["connections_refused_total",] >= 1
        ask(context, address, BLUE, keys=client)
    told = dict(events(caplog))
    assert told["connection_refused"] == {"reason": "an unlisted key"}
    assert told["connection_opened"] == {"peer": z85.decode(client.own.public).hex()}


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, object]]]:
    return [(record.event, record.fields) for record in caplog.records if hasattr(record, "event")]  # type: ignore[attr-defined]


def test_events(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cloven"), serving("inproc://s", context=context):
        ask(context, "inproc://s", BLUE, *[[b"garbage"]] * 30)
    told = events(caplog)
    assert told[0] == ("server_started", {"role": "painter"})
    assert told[-1] == ("server_stopped", {"role": "painter", "answered": 1, "refused": 30})
    refusals = [fields for event, fields in told if event == "request_refused"]
    assert 1 <= len(refusals) <= 5 and refusals[0] == {"code": "malformed", "peer": "", "requests": 1}  # not a line for each of them
