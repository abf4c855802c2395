"""The adapter server: what it answers, what it refuses, what it counts."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.errors import BadBundle, BadInput, LedgerUnusable, TamperedBundle
from cloven.field.residues import H, P
from cloven.private_lora import ledger as ledger_module
from cloven.private_lora.ledger import BLOCK, Ledger
from cloven.private_lora.manifest import SERVER_FILE, ServerManifest
from cloven.private_lora.messages import ADAPTER, Answer, Encrypted, Query
from cloven.private_lora.prepare import LEDGER_FILE
from cloven.private_lora.server import AdapterServer, ServedAdapter
from cloven.wire.keys import TrustedKeys, generate_client, generate_keys, trusted_keys, worker_keys
from cloven.wire.messages import residue_frame
from cloven.wire.schema import ErrorAnswer, Hello, Welcome
from tests.helpers import Context, free_port, random_residues
from tests.lora_bundles import adapter_server, charged, copied, ledger_of, lora_bundle, own_bundle, tensors


@dataclass
class Peer:
    """A client by hand: frames in, frames out."""

    socket: Any
    bundle: bytes
    columns: int
    rows: int

    def ask(self, *frames: Any) -> list[bytes]:
        """The frames of the answer."""
        self.socket.send_multipart(list(frames))
        assert self.socket.poll(10_000), "the server is silent"
        return [bytes(frame) for frame in self.socket.recv_multipart()]

    def query(self, c: Tensor | None = None, group: int = 0, rows: int | None = None, id: int = 1, payload: bytes | None = None) -> Any:
        """A query about a group: the header of the answer, and q if there is one."""
        c = random_residues(2, self.columns) if c is None else c
        message = Query(id, self.bundle, group, c.shape[0] if rows is None else rows)
        answer = self.ask(ADAPTER.pack(message), residue_frame(c) if payload is None else payload)
        header, frame = ADAPTER.unpack(list(answer))
        return header if frame is None else (header, np.frombuffer(frame, "<i2").reshape(len(c), -1))

    def alive(self) -> bool:
        """Whether a right query is answered."""
        return isinstance(self.query()[0], Answer)


@contextlib.contextmanager
def peer_of(out: Path, address: str, context: Context, keys: TrustedKeys | None = None) -> Iterator[Peer]:
    manifest = ServerManifest.read(out / "server")
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = keys.own.public, keys.own.secret, keys.worker
    socket.connect(address)
    try:
        yield Peer(socket, bytes.fromhex(manifest.bundle), manifest.groups[0].columns, manifest.groups[0].rows)
    finally:
        socket.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return copied(lora_bundle(), tmp_path / "out")


@pytest.fixture
def served(out: Path, context: Context) -> Iterator[tuple[Any, Peer]]:
    """A server, and a client by hand."""
    with adapter_server(out / "server", "inproc://s", context=context) as server, peer_of(out, "inproc://s", context) as peer:
        yield server, peer


def test_the_answer_is_the_product_rounded(out: Path, served: tuple[Any, Peer]) -> None:
    _, peer = served
    matrix = tensors(out / "server" / SERVER_FILE)["0"].to(torch.int64)
    for c in (random_residues(3, peer.columns), torch.full((1, peer.columns), H, dtype=torch.int32)):
        header, q = peer.query(c, id=77)
        assert header == Answer(77, c.shape[0])
        z = (c.to(torch.int64) @ matrix.t() + H) % P - H
        assert q.tolist() == (z >> 15).tolist()


def test_the_same_query_has_the_same_answer(served: tuple[Any, Peer]) -> None:
    c = random_residues(2, served[1].columns)
    assert (served[1].query(c)[1] == served[1].query(c)[1]).all()


def test_hello(served: tuple[Any, Peer]) -> None:
    server, peer = served
    assert ADAPTER.unpack(peer.ask(ADAPTER.pack(Hello(3, peer.bundle))))[0] == Welcome(3, peer.bundle, 8)
    assert charged(server) == 0


def error(peer: Peer, code: str, *frames: Any, id: int = 1) -> str:
    header, payload = ADAPTER.unpack(list(peer.ask(*frames)))
    assert isinstance(header, ErrorAnswer) and payload is None
    assert (header.code, header.id) == (code, id)
    return header.text


def test_refusals_are_answers_cost_nothing_and_the_server_lives(served: tuple[Any, Peer]) -> None:
    server, peer = served
    c = bytes(residue_frame(random_residues(2, peer.columns)))
    good = ADAPTER.pack(Query(1, peer.bundle, 0, 2))
    outside = np.frombuffer(c, "<i4").copy()

    def query(group: int = 0, rows: int = 2, bundle: bytes = peer.bundle) -> bytes:
        return ADAPTER.pack(Query(1, bundle, group, rows))

    error(peer, "size", good, c[:-4])
    error(peer, "size", good, c + bytes(4))
    error(peer, "size", good, b"")
    error(peer, "size", query(rows=3), c)
    error(peer, "size", query(group=3), c)  # of another width
    assert "too many" in error(peer, "size", query(rows=10**6), c)
    error(peer, "size", query(rows=2**62), c)
    error(peer, "group", query(group=8), c)
    error(peer, "group", query(group=2**62), c)
    error(peer, "bundle", query(bundle=bytes(16)), c)
    error(peer, "bundle", ADAPTER.pack(Hello(1, b"x" * 16)))
    for value in (H + 1, -H - 1, 2**31 - 1, -(2**31)):
        outside[5] = value
        assert "no residue" in error(peer, "malformed", good, outside.tobytes())
    error(peer, "malformed", good)
    error(peer, "malformed", ADAPTER.pack(Answer(1, 2)), c)
    error(peer, "malformed", good, c, b"x", id=0)
    error(peer, "malformed", b"garbage", id=0)
    error(peer, "malformed", ADAPTER.pack(Encrypted(1, peer.bundle, 0)), b"x" * 100)  # the fhe backend is off
    assert charged(server) == 0
    assert peer.alive() and charged(server) == BLOCK and server.answered == 1


def test_no_rows(served: tuple[Any, Peer]) -> None:
    _, peer = served
    fields = {"v": 5, "type": "query", "id": 9, "bundle": peer.bundle, "group": 0, "rows": 0}
    error(peer, "malformed", msgpack.packb(fields), b"", id=9)
    assert peer.alive()


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=3))
def test_any_frames(fuzzed: Peer, frames: list[bytes]) -> None:
    header, _ = ADAPTER.unpack(list(fuzzed.ask(*frames)))
    assert isinstance(header, ErrorAnswer)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    context: Context = zmq.Context()
    out = copied(lora_bundle(), tmp_path_factory.mktemp("fuzzed") / "out")
    with adapter_server(out / "server", "inproc://s", context=context), peer_of(out, "inproc://s", context) as peer:
        yield peer
    context.destroy(linger=0)


def test_a_failure_inside_tells_nothing(
    served: tuple[Any, Peer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("W' is 3.14")

    with monkeypatch.context() as patch:
        patch.setattr("cloven.private_lora.server.multiply", fail)
        header = served[1].query()
    assert isinstance(header, ErrorAnswer) and header.code == "internal" and "3.14" not in header.text
    assert served[1].alive()


# --- metering


def test_charged_before_anything_is_computed(served: tuple[Any, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    server, peer = served
    seen: list[int] = []
    monkeypatch.setattr(
        "cloven.private_lora.server.multiply", lambda *_: (seen.append(charged(server)), torch.zeros(2, peer.rows, dtype=torch.int32))[1]
    )
    peer.query()
    assert seen == [BLOCK]


def test_the_budget_ends(tmp_path: Path, context: Context) -> None:
    out = own_bundle(tmp_path / "out", budget=20)
    with adapter_server(out / "server", "inproc://s", context=context) as server, peer_of(out, "inproc://s", context) as peer:
        for _ in range(10):
            assert peer.alive()
        refusal = peer.query()
        assert isinstance(refusal, ErrorAnswer) and (refusal.code, refusal.id) == ("budget", 1)
        assert "the budget of answers is used up" in refusal.text
        assert charged(server) == 20 and server.answered == 10
        assert peer.query(group=1)[0] == Answer(1, 2)  # of the same width, with a budget of its own


def test_an_unusable_ledger_gives_no_answer(
    served: tuple[Any, Peer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, peer = served
    monkeypatch.setattr(ledger_module, "_WAIT_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(ledger_of(server)._path, isolation_level=None)) as other:
        ledger_of(server)._database.execute("PRAGMA busy_timeout = 50")
        other.execute("BEGIN IMMEDIATE")
        refusal = peer.query()
        assert isinstance(refusal, ErrorAnswer) and refusal.code == "ledger" and str(ledger_of(server)._path) not in refusal.text
        other.execute("ROLLBACK")
    assert "is locked" in caplog.text and server.answered == 0
    assert peer.alive()


def test_closing_gives_back_what_was_reserved(out: Path, context: Context) -> None:
    with adapter_server(out / "server", "inproc://s", context=context) as server, peer_of(out, "inproc://s", context) as peer:
        peer.alive()
        assert charged(server) == BLOCK
    adapter = ServedAdapter(out / "server", {})
    assert [account.rows for account in adapter.ledger.accounts()] == [2, 2, 2]
    adapter.ledger.close()


def test_two_servers_share_a_ledger(tmp_path: Path, context: Context) -> None:
    out = own_bundle(tmp_path / "out", budget=600, share=600)
    with (
        adapter_server(out / "server", "inproc://one", context=context) as one,
        adapter_server(out / "server", "inproc://two", context=context) as two,
        peer_of(out, "inproc://one", context) as first,
        peer_of(out, "inproc://two", context) as second,
    ):
        answered = 0
        for _ in range(8):
            for peer in (first, second):
                answered += 50 if isinstance(peer.query(random_residues(50, peer.columns)), tuple) else 0
        assert answered <= 600 and charged(one) == charged(two) <= 600
        assert answered >= 500


def test_clients_are_their_keys(tmp_path: Path, context: Context) -> None:
    """Two clients over CURVE, a share each; one cannot spend the other's."""
    generate_keys(tmp_path / "keys")
    generate_client(tmp_path / "second", tmp_path / "keys")
    address = f"tcp://127.0.0.1:{free_port()}"
    out = own_bundle(tmp_path / "out", budget=10, share=6)
    clients = [trusted_keys(tmp_path / name) for name in ("keys", "second")]
    assert clients[0].own.public != clients[1].own.public and clients[0].worker == clients[1].worker
    with adapter_server(out / "server", address, keys=worker_keys(tmp_path / "keys")) as server, contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(peer_of(out, address, context, keys)) for keys in clients)
        again = stack.enter_context(peer_of(out, address, context, clients[0]))
        assert all(peer.alive() for peer in (one, again, one))
        for peer in (one, again):  # another connection is the same client
            refusal = peer.query()
            assert refusal.code == "budget" and "this client's share" in refusal.text
        assert two.alive() and two.alive()
        refusal = two.query(random_residues(1, two.columns))
        assert refusal.code == "budget" and "the budget" in refusal.text
        accounts = {account.client: account.rows for account in ledger_of(server).accounts()}
        assert sorted(accounts.values()) == [4, 6] and all(len(client) == 64 for client in accounts)


def test_several_bundles_at_one_address(tmp_path: Path, context: Context) -> None:
    first, second = copied(lora_bundle(), tmp_path / "a"), copied(lora_bundle("gpt2"), tmp_path / "b")
    server = AdapterServer([first / "server", second / "server"], "inproc://s", context=context)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        for out in (first, second):
            with peer_of(out, "inproc://s", context) as peer:
                assert peer.alive()
    finally:
        server.stop()
        thread.join(10)
    with pytest.raises(BadInput, match="is given twice"):
        AdapterServer([first / "server", first / "server"], "inproc://t", context=context)


def test_bundles_of_one_adapter_share_a_ledger(tmp_path: Path, context: Context) -> None:
    """And its reserved rows: what the one reserved, the other may answer."""
    first = own_bundle(tmp_path / "a", budget=20)
    second = own_bundle(tmp_path / "b", budget=20, ledger=first / "server" / LEDGER_FILE)
    server = AdapterServer([first / "server", second / "server"], "inproc://s", context=context)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        with peer_of(first, "inproc://s", context) as one, peer_of(second, "inproc://s", context) as two:
            assert all(peer.alive() for peer in (one, two) * 5)
            assert one.query().code == two.query().code == "budget"
    finally:
        server.stop()
        thread.join(10)


# --- OUT/server


@pytest.mark.parametrize("damage", ["a bit", "short", "gone", "another bundle's"])
def test_a_damaged_half_is_not_served(damage: str, out: Path, context: Context) -> None:
    path = out / "server" / SERVER_FILE
    data = bytearray(path.read_bytes())
    if damage == "a bit":
        data[-1] ^= 1
    elif damage == "short":
        del data[-1]
    elif damage == "another bundle's":
        data = bytearray((lora_bundle("qwen2") / "server" / SERVER_FILE).read_bytes())
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    with pytest.raises((TamperedBundle, BadBundle), match=SERVER_FILE):
        AdapterServer([out / "server"], "inproc://s", context=context)


def test_a_matrix_of_another_shape(out: Path) -> None:
    manifest = ServerManifest.read(out / "server")
    group = replace(manifest.groups[0], rows=manifest.groups[0].rows + 1)
    replace(manifest, groups=(group, *manifest.groups[1:])).write(out / "server")
    with pytest.raises(BadBundle, match="has no int8 matrix"):
        ServedAdapter(out / "server", {})


@pytest.mark.parametrize("damage", ["ledger", "witness"])
def test_no_service_without_ledger_and_witness(damage: str, out: Path, own_state: Path, context: Context) -> None:
    if damage == "ledger":
        (out / "server" / LEDGER_FILE).unlink()
    else:
        shutil.rmtree(own_state)
    with pytest.raises(LedgerUnusable, match="missing"):
        AdapterServer([out / "server"], "inproc://s", context=context)


def test_the_clients_half_is_not_served(out: Path, context: Context) -> None:
    with pytest.raises(BadBundle):
        AdapterServer([out / "client"], "inproc://s", context=context)


def test_an_address_that_is_taken_leaves_the_ledger_closed(out: Path, served: tuple[Any, Peer]) -> None:
    with tempfile.TemporaryDirectory(prefix="c-") as folder:
        (Path(folder) / "s").write_text("in the way")
        with pytest.raises(BadInput):
            AdapterServer([out / "server"], f"ipc://{folder}/s")
    assert served[1].alive()


def test_no_values_in_a_repr(out: Path) -> None:
    adapter = ServedAdapter(out / "server", {})
    assert repr(adapter) == f"ServedAdapter({adapter.manifest.bundle})"
    adapter.ledger.close()


def test_no_values_in_the_repr_of_a_placed_matrix(out: Path) -> None:
    adapter = ServedAdapter(out / "server", {})
    adapter.ledger.close()
    assert "tensor" not in repr(adapter.matrices[0])


# --- counts


def test_what_is_published(served: tuple[Any, Peer]) -> None:
    server, peer = served
    (adapter,) = server.adapters.values()
    name = adapter.manifest.adapter[:16]

    def published() -> dict[tuple[str, ...], float]:
        return {(sample.name.removeprefix("cloven_"), *sample.labels): sample.value for sample in server.samples()}

    budget, share = adapter.ledger.budget()
    before = published()
    assert before["ledger_usable", name] == 1 and before["ledger_left_rows", name] == before["ledger_budget_rows", name] == budget
    peer.query(rows=2)
    found = published()
    assert found["exchanges_total", "socket"] == 1 and found["rows_total", "socket"] == 2
    assert found["ledger_left_rows", name] == budget - BLOCK
    assert found["ledger_client_left_rows", name, server.peers[-1]] == share - BLOCK
    adapter.ledger.close()
    broken = published()
    assert broken["ledger_usable", name] == 0 and ("ledger_left_rows", name) not in broken and broken["exchanges_total", "socket"] == 1


# --- kill -9


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_killed_server_never_counts_too_little(kills: int, tmp_path: Path, context: Context) -> None:
    """At a random moment in mid-service; every next one goes on with the same ledger."""
    out = own_bundle(tmp_path / "out", budget=2**30)
    manifest = ServerManifest.read(out / "server")
    answered, counted = 0, 0
    for _ in range(kills):
        with AdapterServerProcess(out / "server") as server, peer_of(out, server.address, context) as peer:
            assert peer.alive()
            answered += 2
            timer = threading.Timer(random.uniform(0, 0.3), os.kill, (server.pid, signal.SIGKILL))
            timer.start()
            c, header = residue_frame(random_residues(90, peer.columns)), ADAPTER.pack(Query(1, peer.bundle, 0, 90))
            while timer.is_alive() or server.process.poll() is None:
                peer.socket.send_multipart([header, c])
                if not peer.socket.poll(200):
                    break
                assert isinstance(ADAPTER.unpack(peer.socket.recv_multipart())[0], Answer)
                answered += 90
            timer.join()
            server.process.wait(10)
        with contextlib.closing(Ledger(manifest.ledger_path(out / "server"), manifest.adapter)) as ledger:
            (account,) = [account for account in ledger.accounts() if account.matrix == manifest.groups[0].name.split("+")[0]]
        assert answered <= account.rows
        assert account.rows <= answered + kills * 2 * BLOCK and account.rows > counted
        counted = account.rows
