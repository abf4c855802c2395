"""The enclave over a socket: peers, records of what it sends, and whatever a client sends."""

from __future__ import annotations

import itertools
import random
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zmq

from cloven.errors import BadBundle, TamperedBundle
from cloven.kv_shield.messages import (
    DTYPES,
    ENCLAVE,
    NO_SESSION,
    Close,
    Closed,
    Key,
    Keyed,
    Open,
    Opened,
    Restore,
    Restored,
    Seal,
    SealEnd,
    Stepped,
    Unseal,
    frame_of,
    tensor_of,
)
from cloven.kv_shield.service import EnclaveServer
from cloven.model.cache_argument import cache_of, with_cache
from cloven.wire.keys import TrustedKeys
from cloven.wire.schema import ErrorAnswer, Hello, Welcome
from tests.helpers import Context, free_port
from tests.kv_bundles import RecordingServer, by_sequence, enclave_at, ids_of, kv_bundle, positions_of, random_rows, tensors
from tests.kv_bundles import attached as attached_model
from tests.split_models import logits
from tests.wire.test_server import two_clients

ROWS = 3


class Client:
    """Sends frames, returns the answer."""

    def __init__(self, context: Context, address: str, server: EnclaveServer, keys: TrustedKeys | None = None) -> None:
        self.server, self.bundle = server, server.enclave.bundle
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        if keys is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = keys.own.public, keys.own.secret
            self.socket.curve_serverkey = keys.worker
        self.socket.connect(address)
        self.ids = itertools.count(1)

    def ask(self, *frames: Any) -> tuple[Any, memoryview | None]:
        self.socket.send_multipart(list(frames))
        assert self.socket.poll(10_000), "the enclave is silent"
        return ENCLAVE.unpack(list(self.socket.recv_multipart()))

    def send(self, message: Any, *payload: Any) -> tuple[Any, memoryview | None]:
        return self.ask(ENCLAVE.pack(message), *payload)

    def error(self, message: Any, *payload: Any) -> ErrorAnswer:
        answer, _ = self.send(message, *payload)
        assert isinstance(answer, ErrorAnswer) and answer.id == message.id
        return answer

    def open(self, sequences: int = 1) -> bytes:
        answer, _ = self.send(Open(next(self.ids), self.bundle, sequences))
        assert isinstance(answer, Opened)
        return answer.session

    def key(self, name: bytes, first: int = 0, batch: int = 1, **change: Any) -> Key:
        fields = {"layer": 0, "rows": ROWS, "dtype": "float32"} | change
        return Key(next(self.ids), self.bundle, name, fields["layer"], batch, fields["rows"], first, fields["dtype"])

    def key_payload(self, batch: int = 1, first: int = 0, dtype: str = "float32") -> bytes:
        x = random_rows(batch, ROWS, self.server.enclave.widths_in(0), dtype=DTYPES[dtype])
        return bytes(frame_of(positions_of(batch, ROWS, first), x))

    def restore(self, name: bytes, batch: int = 1) -> Restore:
        return Restore(next(self.ids), self.bundle, name, 0, batch, ROWS, "float32")

    def restore_payload(self, batch: int = 1) -> bytes:
        return bytes(frame_of(random_rows(batch, ROWS, self.server.enclave.width_keyed(0))))


@pytest.fixture(params=["permute", "session"])
def client(request: pytest.FixtureRequest, context: Context, socket_folder: Path) -> Iterator[Client]:
    address = f"ipc://{socket_folder}/s"
    with enclave_at(kv_bundle("llama", request.param) / "trusted", address) as server:
        client = Client(context, address, server)
        yield client
        client.socket.close()


def sessions_only(client: Client) -> None:
    if not client.server.enclave.noise:
        pytest.skip("permute mode keeps no sessions")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_of_each(client: Client, dtype: str) -> None:
    enclave = client.server.enclave
    assert client.send(Hello(7, client.bundle))[0] == Welcome(7, client.bundle, 2)
    name = client.open(2) if enclave.noise else NO_SESSION
    request = client.key(name, batch=2, dtype=dtype)
    answer, payload = client.send(request, client.key_payload(2, dtype=dtype))
    assert answer == Keyed(request.id, 2, ROWS) and payload is not None
    width = 8 * (12 + enclave.noise) if enclave.noise else 6 * 12
    assert bool(tensor_of(payload, (2, ROWS, width), DTYPES[dtype]).isfinite().all())
    answer, payload = client.send(client.restore(name, 2), client.restore_payload(2))
    assert isinstance(answer, Restored) and payload is not None and payload.nbytes == 4 * 2 * ROWS * 48
    if enclave.noise:
        answer, _ = client.send(Close(9, client.bundle, name))
        assert answer == Closed(9) and not enclave._sessions
    assert client.server.refused == 0


def test_refusals_say_to_whom_and_why(client: Client) -> None:
    enclave = client.server.enclave
    name = client.open() if enclave.noise else NO_SESSION
    good, a = client.key_payload(), client.restore_payload()
    cases = [
        (client.key(name, layer=2), good, "group"),
        (client.key(name, layer=2**63 - 1), good, "group"),
        (client.key(name, rows=ROWS + 1), good, "size"),
        (client.key(name, rows=2**30), good, "size"),
        (client.key(name, dtype="bfloat16"), good, "size"),
        (client.key(name, batch=2), good, "size"),
        (client.key(name, dtype="float64"), good, "malformed"),
        (client.key(name), good[:-4], "size"),
        (client.key(name), good + bytes(4), "size"),
        (client.key(name), b"", "size"),
        (client.key(name), b"\xff\xff\xff\x7f" + good[4:], "size"),  # a position
        (client.restore(name), a[:-4], "size"),
        (Keyed(5, 1, 1), b"x", "malformed"),
        (Restored(5, 1, 1), b"x", "malformed"),
        (Opened(5, bytes(16)), None, "malformed"),
        (Closed(5), None, "malformed"),
        (Welcome(5, client.bundle, 2), None, "malformed"),
        (ErrorAnswer(5, "size", ""), None, "malformed"),
        (Hello(5, bytes(16)), None, "bundle"),
        (Open(5, bytes(16), 1), None, "bundle"),
        (Close(5, bytes(16), name), None, "bundle"),
        (Close(5, client.bundle, b"\x01" * 16), None, "session"),
    ]
    if enclave.noise:
        cases += [
            (client.key(b"\x01" * 16), good, "session"),
            (client.key(name, first=1), good, "session"),
            (client.restore(name), a, "session"),
        ]
    else:
        cases += [(Open(5, client.bundle, 1), None, "session")]
    for message, payload, code in cases:
        error = client.error(message, *([payload] if payload is not None else []))
        assert error.code == code, (message, error)
    assert client.server.refused == len(cases)
    answer, _ = client.send(client.key(name), good)  # none of them keyed anything
    assert isinstance(answer, Keyed)


def test_a_second_connection_of_this_user_is_the_same_peer(client: Client, context: Context) -> None:
    """Over ipc the peer is the user: what the design binds to CURVE keys is bound to the uid here."""
    sessions_only(client)
    name = client.open()
    assert client.server.enclave._sessions[name].peer == "local"


def test_a_session_belongs_to_a_key_over_curve(tmp_path: Path, context: Context) -> None:
    keys, clients = two_clients(tmp_path)
    address, trusted = f"tcp://127.0.0.1:{free_port()}", kv_bundle("llama", "session") / "trusted"
    with enclave_at(trusted, address, keys=keys) as server:
        one, two = (Client(context, address, server, client) for client in clients)
        name = one.open()
        payload = one.key_payload()
        assert isinstance(one.send(one.key(name), payload)[0], Keyed)
        for message, frames in (
            (two.key(name, first=ROWS), [payload]),
            (two.restore(name), [two.restore_payload()]),
            (Close(99, two.bundle, name), []),
        ):
            assert two.error(message, *frames).code == "session"
        assert isinstance(one.send(one.key(name, first=ROWS), payload)[0], Keyed)  # none of it did harm
        again = Client(context, address, server, clients[0])  # another connection with the same key
        assert isinstance(again.send(again.restore(name), again.restore_payload())[0], Restored)
        for client in (one, two, again):
            client.socket.close()


def test_answers_name_no_values(client: Client) -> None:
    name = client.open() if client.server.enclave.noise else NO_SESSION
    x = torch.full((1, ROWS, client.server.enclave.widths_in(0)), 1234.5)
    error = client.error(client.key(name, layer=5), bytes(frame_of(positions_of(1, ROWS), x)))
    assert "1234" not in error.text and name.hex() not in error.text


def fuzz(client: Client, examples: int, seed: int) -> None:
    generator = random.Random(seed)
    noise = client.server.enclave.noise
    codes = set()
    for number in range(examples):
        name = client.open() if noise and number % 50 == 0 else (next(iter(client.server.enclave._sessions)) if noise else NO_SESSION)
        message = generator.choice(
            [
                Hello(1, client.bundle),
                Open(1, client.bundle, generator.choice([1, 2, 5000])),
                client.key(name, first=generator.choice([0, 3, 6])),
                client.restore(name),
                Close(1, client.bundle, secrets.token_bytes(16)),
                Keyed(1, 1, 1),
                Seal(1, client.bundle, name, 0, "keys", 0, [1, ROWS], "float32"),
                SealEnd(1, client.bundle, name, 0),
                Unseal(1, client.bundle, name, 0, 0, "keys", 0, [1, ROWS], "float32"),
            ]
        )
        fields: dict[str, Any] = msgpack.unpackb(ENCLAVE.pack(message))
        payload = client.key_payload() if isinstance(message, Key) else client.restore_payload()
        header = msgpack.packb(fields)
        kind = generator.randrange(7)
        if kind == 0:
            header = generator.randbytes(generator.randrange(80))
        elif kind == 1:
            changed = bytearray(header)
            for _ in range(generator.randrange(1, 4)):
                changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
            header = bytes(changed)
        elif kind == 2:
            field = generator.choice(list(fields))
            wrong = [None, -1, 0, 1, 2**31, 2**63 - 1, "x", b"", 1.5, [], generator.randbytes(16)]
            header = msgpack.packb({**fields, field: generator.choice(wrong)})
        elif kind == 3:
            header = header[: generator.randrange(len(header))]
        elif kind == 4:
            payload = payload[: generator.randrange(len(payload))]
        elif kind == 5:
            payload = generator.randbytes(len(payload))  # positions and numbers of any kind, NaN among them
        else:
            payload = b"\xff" * len(payload)
        frames = [header, payload] if generator.random() < 0.7 else [header, payload, b"more"][: generator.choice([1, 3])]
        answer, _ = client.ask(*frames)
        assert isinstance(answer, ErrorAnswer | Welcome | Keyed | Restored | Opened | Closed)
        if isinstance(answer, ErrorAnswer):
            codes.add(answer.code)
    assert "internal" not in codes and len(codes) >= 4
    name = client.open() if noise else NO_SESSION
    assert isinstance(client.send(client.key(name), client.key_payload())[0], Keyed)
    assert client.send(Hello(1, client.bundle))[0] == Welcome(1, client.bundle, 2)


def test_fuzz_short(client: Client) -> None:
    fuzz(client, 500, 0)


@pytest.mark.long
def test_fuzz_long(client: Client) -> None:
    for seed in range(1, 20):
        fuzz(client, 1000, seed)
        client.server.enclave._sessions.clear()


def needles(server: RecordingServer, trusted: Path) -> list[bytes]:
    """Bytes of every key that the enclave has: rows of matrices, permutations in any width of integer, norms."""
    found = []
    for name, tensor in tensors(trusted / "keys.safetensors").items():
        if name.endswith((".qk", ".v")):
            inverse = tensor.argsort(1)
            for order in (*tensor, *inverse):
                found += [
                    bytes(frame_of(order.to(kind)))[: 8 * kind.itemsize] for kind in (torch.uint8, torch.int16, torch.int32, torch.int64)
                ]
    for session in server.enclave._sessions.values():
        for keys in session.keys:
            for key in by_sequence(keys) if keys is not None else []:
                for matrix in (key.k, key.k_inverse, key.v, key.v_inverse):
                    for rows in (matrix, matrix.transpose(1, 2)):
                        found += [bytes(frame_of(row[:4])) for head in rows for row in head]
    return found


@pytest.mark.parametrize("mode", ["permute", "session"])
def test_no_message_holds_a_key(mode: str) -> None:
    with attached_model("llama", mode, RecordingServer) as a:
        cache = cache_of(a.model(input_ids=ids_of(2, 7), use_cache=True))
        logits(a.model, ids_of(2, 1), **with_cache(cache))
        a.model.generate(ids_of(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
        sent = b"|".join(b"|".join(frames) for frames in a.server.sent)
        keys = needles(a.server, kv_bundle("llama", mode) / "trusted")
        assert len(a.server.sent) > 10 and len(keys) > 20
        assert not any(key in sent for key in keys)
        # the search finds what it looks for
        assert keys[0] in sent + keys[0] + b"|"
        kinds = {type(ENCLAVE.unpack(frames)[0]) for frames in a.server.sent}
        assert kinds <= {Welcome, Opened, Keyed, Restored, Closed, Stepped}
        for frames in a.server.sent:  # outside payloads: a name, a bundle, and counts
            assert len(frames[0]) < 80


def damaged(tmp_path: Path) -> Path:
    shutil.copytree(kv_bundle("llama", "permute") / "trusted", tmp_path / "t")
    with (tmp_path / "t" / "keys.safetensors").open("ab") as file:
        file.write(b"x")
    return tmp_path / "t"


def test_it_does_not_serve_what_is_no_trusted_half(tmp_path: Path, socket_folder: Path, context: Context) -> None:
    with pytest.raises(BadBundle):
        EnclaveServer(kv_bundle("llama", "permute") / "exposed", f"ipc://{socket_folder}/s", context=context)
    with pytest.raises(TamperedBundle):
        EnclaveServer(damaged(tmp_path), f"ipc://{socket_folder}/s", context=context)
    assert not list(socket_folder.iterdir())  # nothing listens


def test_a_server_that_fails_leaves_nothing_open(tmp_path: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Context] = []

    def make() -> Context:
        made.append(real())
        return made[-1]

    real = zmq.Context
    monkeypatch.setattr(zmq, "Context", make)
    with pytest.raises(TamperedBundle):
        EnclaveServer(damaged(tmp_path), f"ipc://{socket_folder}/s")
    open_contexts = [context for context in made if not context.closed]
    for context in open_contexts:
        context.destroy(linger=0)
    assert not open_contexts
