"""Answers over a lane without Python: the same answers, and not one row more than the ledger has charged."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cloven.errors import BudgetExhausted, LedgerUnusable, WorkerRefused
from cloven.field.native.library import load_kernels
from cloven.field.residues import H, P
from cloven.private_lora.ledger import BLOCK
from cloven.private_lora.manifest import SERVER_FILE, ServerManifest
from cloven.private_lora.messages import ADAPTER, Answer, Query, answer_bytes
from cloven.private_lora.server import AdapterServer
from cloven.wire.channel import Channel
from cloven.wire.lane import lanes_available
from cloven.worker.lane_products import library
from tests.helpers import random_residues
from tests.lora_bundles import adapter_server, copied, lora_bundle, own_bundle, tensors

pytestmark = pytest.mark.skipif(
    library() is None or load_kernels() is None or not lanes_available(), reason="no compiler built the kernels, or this is not Linux"
)


class Client:
    """A client by hand, with a lane of its own."""

    def __init__(self, out: Path, address: str, server: Any) -> None:
        self.manifest = ServerManifest.read(out / "server")
        self.matrices = tensors(out / "server" / SERVER_FILE)
        self.channel = Channel(address, bytes.fromhex(self.manifest.bundle), timeout=10, schema=ADAPTER, peer="adapter-server")
        self.channel.hello()
        self.server = server

    def ask(self, c: Tensor, group: int = 0) -> list[list[int]]:
        """q for residues c [M, D]."""
        bits, width = self.manifest.bits, self.manifest.groups[group].rows
        out = torch.empty(answer_bytes(len(c), width, bits), dtype=torch.uint8)
        payload = self.channel.rows("m", group, c, (Query, Answer), out, lambda: None)
        q: Any = out.numpy() if payload is None else payload
        found: list[list[int]] = np.frombuffer(q, "i1" if bits == 8 else "<i2").reshape(len(c), width).tolist()
        return found

    def expected(self, c: Tensor, group: int = 0) -> list[list[int]]:
        """The same by integers."""
        z = (c.long() @ self.matrices[str(group)].long().t() + H) % P - H
        found: list[list[int]] = (z >> (31 - self.manifest.bits)).tolist()
        return found

    def rows(self, count: int, group: int = 0, seed: int = 1) -> Tensor:
        """Queries."""
        return random_residues(count, self.manifest.groups[group].columns, seed)

    def charged(self) -> int:
        """Rows of the first group that are charged now, over all clients."""
        first = self.manifest.groups[0].name.split("+")[0]
        (adapter,) = self.server.adapters.values()
        return sum(account.rows for account in adapter.ledger.accounts() if account.matrix == first)


@contextlib.contextmanager
def serving(out: Path, address: str, clients: int = 1) -> Iterator[list[Client]]:
    with adapter_server(out / "server", address, AdapterServer) as server, contextlib.ExitStack() as stack:
        found = [Client(out, address, server) for _ in range(clients)]
        for client in found:
            stack.callback(client.channel.close)
        yield found


@pytest.fixture
def address(socket_folder: Path) -> str:
    return f"ipc://{socket_folder}/s"


def headed(*_: Any, **__: Any) -> Any:
    raise AssertionError("this had a header")


@pytest.mark.parametrize("bits", [8, 13, 16])
def test_the_same_answers_without_headers(bits: int, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(own_bundle(tmp_path / "out", bits=bits), address) as (client,):
        monkeypatch.setattr(client.channel, "exchange", headed)
        for group in range(len(client.manifest.groups)):
            for count in (1, 3, 11):
                c = client.rows(count, group, count)
                assert client.ask(c, group) == client.expected(c, group)
        native = client.server.counts.ways()["native"]
        assert native.rows == 15 * len(client.manifest.groups) and native.exchanges == 3 * len(client.manifest.groups)


def test_rows_are_charged_before_they_are_answered_and_given_back(tmp_path: Path, address: str) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    with serving(out, address) as (client,):
        assert client.charged() == 0
        client.ask(client.rows(3))
        assert client.charged() == BLOCK
        client.ask(client.rows(BLOCK - 3)[:10])
        assert client.charged() == BLOCK
    with serving(out, address) as (client,):
        assert client.charged() == 13


def test_an_empty_ledger_says_so_and_nothing_is_answered(tmp_path: Path, address: str) -> None:
    """Through the socket: what is asked without a header has no other answer than the product."""
    with serving(own_bundle(tmp_path / "out", budget=20, share=20), address) as (client,):
        for _ in range(2):
            client.ask(client.rows(10))
        for _ in range(2):
            with pytest.raises(BudgetExhausted, match="answers is used up"):
                client.ask(client.rows(1))
        c = client.rows(2, 1)
        assert client.ask(c, 1) == client.expected(c, 1)  # another group has a budget of its own
        assert client.charged() == 20


def test_two_lanes_share_the_last_rows(tmp_path: Path, address: str) -> None:
    """What one has been lent and does not need, the other gets."""
    with serving(own_bundle(tmp_path / "out", budget=20, share=20), address, 2) as (one, two):
        one.ask(one.rows(1))
        two.ask(two.rows(10))
        one.ask(one.rows(9))
        for client in (one, two):
            with pytest.raises(BudgetExhausted):
                client.ask(client.rows(1))
        assert one.charged() == 20


def test_attack_many_lanes_at_once_get_no_row_more_than_the_budget(tmp_path: Path, address: str) -> None:
    """Adversary: a client with several lanes, which races them at a ledger that is nearly empty."""
    budget, answered, lock = 300, [0], threading.Lock()
    with serving(own_bundle(tmp_path / "out", budget=budget, share=budget), address, 4) as clients:

        def ask(client: Client, seed: int) -> None:
            c = client.rows(3, seed=seed)
            with contextlib.suppress(BudgetExhausted):
                for _ in range(200):
                    assert client.ask(c) == client.expected(c)
                    with lock:
                        answered[0] += 3

        threads = [threading.Thread(target=ask, args=(client, seed)) for seed, client in enumerate(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answered[0] == budget == clients[0].charged()


def test_what_are_no_residues_is_not_answered_and_costs_nothing(tmp_path: Path, address: str) -> None:
    out = copied(lora_bundle(), tmp_path / "out")
    with serving(out, address) as (client,):
        wrong = client.rows(1).clone()
        wrong[0, 7] = H + 1
        with pytest.raises(WorkerRefused, match="no residue"):  # the socket says why
            client.ask(wrong)
        c = client.rows(2)
        assert client.ask(c) == client.expected(c)
    with serving(out, address) as (client,):
        assert client.charged() == 2


def test_a_ledger_that_fails_is_no_answer(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(copied(lora_bundle(), tmp_path / "out"), address) as (client,):

        def fail(*_: Any) -> int:
            raise LedgerUnusable("the ledger is locked")

        (adapter,) = client.server.adapters.values()
        with monkeypatch.context() as patch:
            patch.setattr(adapter.ledger, "_charge", fail)
            with pytest.raises(WorkerRefused, match="the adapter's ledger cannot be used"):
                client.ask(client.rows(1))
        c = client.rows(1)
        assert client.ask(c) == client.expected(c)


def test_a_lane_that_ends_gives_back_what_it_was_lent(tmp_path: Path, address: str) -> None:
    with serving(own_bundle(tmp_path / "out", budget=BLOCK, share=BLOCK), address, 2) as (one, two):
        one.ask(one.rows(1))
        one.channel.close()
        (adapter,) = two.server.adapters.values()
        deadline = time.monotonic() + 10
        while adapter.ledger._recalls[1:] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(adapter.ledger._recalls) == 1
        for _ in range(BLOCK // 15):
            two.ask(two.rows(15))
        assert two.charged() == BLOCK


def test_without_the_loop_python_answers(tmp_path: Path, address: str) -> None:
    with serving(copied(lora_bundle(), tmp_path / "out"), address) as (client,):
        (adapter,) = client.server.adapters.values()
        adapter.lane_answers = None
        client.channel.hello()
        c = client.rows(2)
        assert client.ask(c) == client.expected(c)
        assert client.server.counts.ways()["lane"].rows == 2


def test_what_is_asked_in_numbers_only_is_of_the_bundle_that_was_named(tmp_path: Path, address: str) -> None:
    """Two adapters at one server: each client's groups are its own bundle's."""
    outs = [own_bundle(tmp_path / f"out{seed}", seed=seed) for seed in (1, 2)]
    server = AdapterServer([out / "server" for out in outs], address)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        for out in outs:
            client = Client(out, address, server)
            c = client.rows(2)
            assert torch.tensor(client.ask(c)).equal(torch.tensor(client.expected(c)))
            client.channel.close()
    finally:
        server.stop()
        thread.join(10)
