"""A real worker, served from a thread, over every transport; CURVE and ipc admission are in tests/wire/test_admission.py."""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from cloven.errors import BadInput, ForeignBundle, PeerRefused, RunError, WorkerRefused
from cloven.wire.channel import Channel
from cloven.wire.limits import rows_per_exchange
from cloven.wire.messages import Message, Multiply, Product, pack, residue_frame, unpack
from cloven.wire.schema import ErrorAnswer, Hello, Welcome
from cloven.wire.server import PLAIN_TCP_BANNER
from cloven.worker.matrices import Matrices
from cloven.worker.service import Worker
from tests.helpers import Context, free_port, python_product, random_codes, random_residues, serving, write_exposed

GROUPS = [random_codes(4, 16, 1), random_codes(9, 7, 2)]


@dataclasses.dataclass
class Bundle:
    """An exposed half on disk."""

    folder: Path
    id: bytes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "exposed"
    return Bundle(folder, bytes.fromhex(write_exposed(folder, GROUPS).bundle))


class Raw:
    """A client that sends any frames."""

    def __init__(self, context: Context, address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(address)

    def ask(self, *frames: bytes) -> tuple[Message, memoryview | None]:
        self.socket.send_multipart(frames)
        assert self.socket.poll(5000), "no answer"
        return unpack(list(self.socket.recv_multipart()))

    def error(self, *frames: bytes) -> ErrorAnswer:
        message, _ = self.ask(*frames)
        assert isinstance(message, ErrorAnswer)
        return message


@pytest.fixture
def worker(bundle: Bundle, context: Context) -> Iterator[Worker]:
    with serving(bundle.folder, "inproc://worker", context=context) as worker:
        yield worker


@pytest.fixture
def raw(worker: Worker, context: Context) -> Iterator[Raw]:
    raw = Raw(context, "inproc://worker")
    yield raw
    raw.socket.close()


@pytest.mark.parametrize("transport", ["inproc", "ipc", "tcp"])
def test_products(bundle: Bundle, context: Context, socket_folder: Path, transport: str) -> None:
    address = {"inproc": "inproc://w", "ipc": f"ipc://{socket_folder}/s/w", "tcp": f"tcp://127.0.0.1:{free_port()}"}[transport]
    shared = context if transport == "inproc" else None
    plain = transport == "tcp"
    with serving(bundle.folder, address, context=shared, insecure_plain_tcp=plain) as worker:
        channel = Channel(address, bundle.id, timeout=5, context=shared, insecure_plain_tcp=plain)
        try:
            assert channel.hello() == 2
            for group, codes in enumerate(GROUPS):
                c = random_residues(33, codes.shape[1], group)
                assert torch.equal(channel.multiply("layer", group, c, codes.shape[0], lambda: None), python_product(c, codes))
        finally:
            channel.close()
    assert (worker.answered, worker.refused) == (channel.telemetry.total().exchanges, 0)


def test_many_clients(bundle: Bundle, worker: Worker, context: Context) -> None:
    wrong: list[int] = []

    def session(seed: int) -> None:
        channel = Channel("inproc://worker", bundle.id, timeout=20, context=context)
        for i in range(10):
            c = random_residues(3, 16, 100 * seed + i)
            if not torch.equal(channel.multiply("layer", 0, c, 4, lambda: None), python_product(c, GROUPS[0])):
                wrong.append(seed)
        channel.close()

    threads = [threading.Thread(target=session, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert worker.answered == 60
    assert not wrong


def test_it_keeps_no_state_between_requests(bundle: Bundle, raw: Raw) -> None:
    c = random_residues(2, 16)
    request = [pack(Multiply(7, bundle.id, 0, 2)), bytes(residue_frame(c))]
    answers = [raw.ask(*request) for _ in range(2)]  # a repetition, without a hello before it
    for message, payload in answers:
        assert message == Product(7, 2)
        assert payload is not None
        assert bytes(payload) == bytes(residue_frame(python_product(c, GROUPS[0])))


def test_hello(bundle: Bundle, raw: Raw) -> None:
    assert raw.ask(pack(Hello(3, bundle.id)))[0] == Welcome(3, bundle.id, 2)


def test_refusals_say_to_whom_and_why(bundle: Bundle, worker: Worker, raw: Raw) -> None:
    c = bytes(residue_frame(random_residues(2, 16)))
    too_many = rows_per_exchange(16, 4) + 1
    cases: list[tuple[list[bytes], int, str]] = [
        ([b""], 0, "malformed"),
        ([b"garbage"], 0, "malformed"),
        ([pack(Hello(4, bundle.id)), b"payload"], 4, "malformed"),
        ([pack(Hello(4, bytes(16)))], 4, "bundle"),
        ([pack(Multiply(5, bytes(16), 0, 2)), c], 5, "bundle"),
        ([pack(Multiply(5, bundle.id, 2, 2)), c], 5, "group"),
        ([pack(Multiply(5, bundle.id, 2**63 - 1, 2)), c], 5, "group"),
        ([pack(Multiply(5, bundle.id, 0, 2))], 5, "malformed"),
        ([pack(Multiply(5, bundle.id, 0, 3)), c], 5, "size"),
        ([pack(Multiply(5, bundle.id, 1, 2)), c], 5, "size"),
        ([pack(Multiply(5, bundle.id, 0, too_many)), c], 5, "size"),
        ([pack(Multiply(5, bundle.id, 0, 2**63 - 1)), c], 5, "size"),
        ([pack(Multiply(5, bundle.id, 0, 2)), c[:-4] + b"\xff\xff\xff\x7f"], 5, "malformed"),
        ([pack(Multiply(5, bundle.id, 0, 2)), c, b""], 0, "malformed"),
        ([pack(Welcome(6, bundle.id, 2))], 6, "malformed"),
        ([pack(Product(6, 2)), c], 6, "malformed"),
        ([pack(ErrorAnswer(6, "size", ""))], 6, "malformed"),
        ([pack(Hello(4, bundle.id)).replace(b"\xa1v\x05", b"\xa1v\x01")], 4, "version"),
    ]
    for frames, request, code in cases:
        error = raw.error(*frames)
        assert (error.id, error.code) == (request, code), frames[0]
    assert worker.refused == len(cases)
    assert raw.ask(pack(Hello(9, bundle.id)))[0] == Welcome(9, bundle.id, 2)


def test_a_failure_inside_is_answered_and_logged(
    bundle: Bundle, raw: Raw, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_self: Matrices, _group: int, _c: torch.Tensor) -> torch.Tensor:
        raise MemoryError("values 1 2 3")

    monkeypatch.setattr(Matrices, "multiply", fail)
    request = [pack(Multiply(5, bundle.id, 0, 2)), bytes(residue_frame(random_residues(2, 16)))]
    error = raw.error(*request)
    assert error.code == "internal"
    assert "values" not in error.text
    assert "a request failed" in caplog.text
    monkeypatch.undo()
    assert raw.ask(*request)[0] == Product(5, 2)


def test_the_channels_view_of_refusals(bundle: Bundle, worker: Worker, context: Context) -> None:
    channel = Channel("inproc://worker", bundle.id, timeout=5, context=context)
    with pytest.raises(WorkerRefused, match=r"layer: .*'group': no group 5: there are 2"):
        channel.multiply("layer", 5, random_residues(1, 16), 4, lambda: None)
    with pytest.raises(WorkerRefused, match="'size'"):
        channel.multiply("layer", 0, random_residues(1, 17), 4, lambda: None)
    channel.close()
    stranger = Channel("inproc://worker", bytes(16), timeout=5, context=context)
    with pytest.raises(ForeignBundle, match=bundle.id.hex()):
        stranger.hello()
    stranger.close()
    assert worker.refused == 3


def test_the_log_holds_no_values(bundle: Bundle, raw: Raw, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "cloven"):
        raw.ask(pack(Multiply(5, bundle.id, 0, 1)), bytes(residue_frame(torch.full((1, 16), 123456789, dtype=torch.int32))))
        raw.error(b"123456789")
    assert "123456789" not in caplog.text


def admission_threads() -> int:
    return sum(thread.name == "cloven-admission" for thread in threading.enumerate())


def test_tcp_needs_keys_or_the_insecure_option(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(BadInput, match="cloven keygen"):
        Worker(bundle.folder, address)
    Worker(bundle.folder, address, insecure_plain_tcp=True).close()
    assert PLAIN_TCP_BANNER.format(what="worker") in caplog.text


def test_a_folder_that_others_can_reach(bundle: Bundle, socket_folder: Path) -> None:
    socket_folder.chmod(0o755)
    with pytest.raises(PeerRefused, match="0700"):
        Worker(bundle.folder, f"ipc://{socket_folder}/w")


def test_a_file_at_the_sockets_path(bundle: Bundle, socket_folder: Path) -> None:
    (socket_folder / "w").write_text("precious")
    before = admission_threads()
    with pytest.raises(BadInput, match="no socket"):
        Worker(bundle.folder, f"ipc://{socket_folder}/w")
    assert (socket_folder / "w").read_text() == "precious"
    assert admission_threads() == before  # nothing of the failed worker is left behind


def test_a_dead_workers_socket_is_taken_over(bundle: Bundle, socket_folder: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(socket_folder / "w"))
    dead.close()  # as after kill -9: the file is there, nobody listens
    with serving(bundle.folder, f"ipc://{socket_folder}/w"):
        channel = Channel(f"ipc://{socket_folder}/w", bundle.id, timeout=5)
        assert channel.hello() == 2
        channel.close()


def test_a_living_workers_socket_is_not(bundle: Bundle, socket_folder: Path) -> None:
    # libzmq unlinks whatever socket is at the path: the first worker would go on unseen, and unlink the second one's when it ends
    address = f"ipc://{socket_folder}/w"
    with serving(bundle.folder, address):
        second = None
        try:
            with pytest.raises(RunError, match=r"cannot listen|already"):
                second = Worker(bundle.folder, address)
        finally:
            if second is not None:
                second.close()


def test_a_port_in_use(bundle: Bundle) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before = admission_threads()
        with pytest.raises(RunError, match="cannot listen"):
            Worker(bundle.folder, f"tcp://127.0.0.1:{taken.getsockname()[1]}", insecure_plain_tcp=True)
        assert admission_threads() == before


def test_stopping(bundle: Bundle, socket_folder: Path) -> None:
    before = admission_threads()
    with serving(bundle.folder, f"ipc://{socket_folder}/w") as worker:
        pass
    assert worker._socket is not None and worker._socket.closed
    assert admission_threads() == before
    worker.close()  # again: no harm


def test_a_worker_that_restarts_goes_on(bundle: Bundle, socket_folder: Path) -> None:
    address = f"ipc://{socket_folder}/w"
    c = random_residues(2, 16)
    channel = Channel(address, bundle.id, timeout=5)
    try:
        for _ in range(2):
            with serving(bundle.folder, address):
                assert torch.equal(channel.multiply("layer", 0, c, 4, lambda: None), python_product(c, GROUPS[0]))
    finally:
        channel.close()


# --- parts


def test_hello_says_what_is_held(bundle: Bundle, context: Context) -> None:
    for part in ("", "layers:1/2", "layers:2/2", "rows:3/4"):
        address = f"inproc://{part or 'everything'}"  # a name is free again some time after its socket was closed
        with serving(bundle.folder, address, context=context, part=part) as worker:
            channel = Channel(address, bundle.id, timeout=5, context=context)
            assert channel.part == ""
            assert channel.hello() == 2 and channel.part == part == str(worker.part)
            channel.close()


def test_groups_of_another_part(bundle: Bundle, context: Context) -> None:
    with serving(bundle.folder, "inproc://part", context=context, part="layers:2/2"):
        raw = Raw(context, "inproc://part")
        c = random_residues(2, 7)
        message, payload = raw.ask(pack(Multiply(7, bundle.id, 1, 2)), bytes(residue_frame(c)))
        assert message == Product(7, 2) and payload is not None
        assert bytes(payload) == bytes(residue_frame(python_product(c, GROUPS[1])))
        error = raw.error(pack(Multiply(8, bundle.id, 0, 2)), bytes(residue_frame(random_residues(2, 16))))
        assert (error.id, error.code, error.text) == (8, "group", "group 0 is not in this worker's part, layers:2/2")
        assert raw.error(pack(Multiply(9, bundle.id, 2, 2)), bytes(residue_frame(c))).text == "no group 2: there are 2"
        assert raw.ask(pack(Hello(10, bundle.id)))[0] == Welcome(10, bundle.id, 2, "layers:2/2")
        raw.socket.close()


def test_rows_of_a_group(bundle: Bundle, context: Context) -> None:
    c = random_residues(3, 7)
    answers = []
    for number in (1, 2, 3):
        with serving(bundle.folder, f"inproc://part-{number}", context=context, part=f"rows:{number}/3"):
            channel = Channel(f"inproc://part-{number}", bundle.id, timeout=5, context=context)
            answers.append(channel.multiply("layer", 1, c, 3, lambda: None))
            with pytest.raises(WorkerRefused, match="malformed"):  # whoever expects more rows than it holds does not get them
                channel.multiply("layer", 1, c, 9, lambda: None)
            channel.close()
    assert torch.equal(torch.cat(answers, dim=1), python_product(c, GROUPS[1]))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("layers:3/2", "give layers:NUMBER/OF"),
        ("layers:0/2", "give layers:NUMBER/OF"),
        ("half", "give layers:NUMBER/OF"),
        ("layers:1/3", "can be spread over 2 at most"),
        ("rows:1/5", "can be spread over 4 at most"),
    ],
)
def test_parts_that_do_not_exist(bundle: Bundle, socket_folder: Path, part: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Worker(bundle.folder, f"ipc://{socket_folder}/w", part=part)
    assert list(socket_folder.iterdir()) == []
