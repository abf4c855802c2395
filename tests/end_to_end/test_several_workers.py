"""Several real workers: placements, workers that are killed, stopped, wrong or misplaced, and what they see.

The workers are `cloven worker` processes, most of them forked from one (see `forked_workers`)."""

from __future__ import annotations

import functools
import json
import random
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zmq
from torch import Tensor
from transformers import PreTrainedModel

import cloven
from cloven.cluster.worker_process import WorkerProcess
from cloven.errors import BadInput, ForeignBundle, SessionClosed, VerificationFailed, WorkerRefused, WorkerUnreachable
from cloven.masks.pad_store import PadStore
from cloven.slip import workers as workers_module
from cloven.slip.pads import fill, fill_job
from cloven.slip.session import SlipSession
from cloven.wire.channel import Channel
from cloven.wire.keys import generate_keys
from tests.end_to_end.commands import Command, one_line
from tests.end_to_end.forked_workers import Farm, ForkedWorker, distinct
from tests.end_to_end.liar import Liar
from tests.helpers import FakeWorker, free_port
from tests.split_models import demo_bundle, greedy, load, logits, open_session, random_ids, tiny_bundle, worker_thread

PROMPT = "ROMEO:"
TOKENS = 6
PREFILL = random_ids(1000, 1, 40)
IDS = random_ids(97, 1, 5)
WHOLE = ""


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with Farm() as farm:
        yield farm


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("k") / "keys"
    generate_keys(folder)
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead worker is given up sooner than in earnest, or the tests would mostly wait."""
    monkeypatch.setattr(workers_module, "PATIENCE", 1.0)


def several(model: PreTrainedModel, addresses: list[str], **options: Any) -> AbstractContextManager[SlipSession]:
    """A session with several workers."""
    return open_session(model, " ".join(addresses), **options)


def seats(workers: list[ForkedWorker], parts: list[str]) -> list[str]:
    """The addresses as `cloven.attach` takes them: those of the same part are replicas."""
    found: dict[str, list[str]] = {}
    for worker, part in zip(workers, parts, strict=True):
        found.setdefault(part, []).append(worker.address)
    return [",".join(addresses) for addresses in found.values()]


def parts_of(kind: str, of: int, replicas: int = 1) -> list[str]:
    return [f"{kind}:{number}/{of}" for number in range(1, of + 1)] * replicas


@functools.cache
def expected(precision: str) -> tuple[list[int], Tensor]:
    """Tokens and the logits of a prompt, by one worker that nobody disturbs."""
    bundle = demo_bundle(precision)
    model = load(bundle.trusted)
    with worker_thread(bundle) as address, open_session(model, address):
        return greedy(model, PROMPT, TOKENS), logits(model, PREFILL)


# --- placements

PLACEMENTS = {
    "replicas": ("replicas", [WHOLE, WHOLE]),
    "two layers": ("layers", parts_of("layers", 2)),
    "three layers": ("layers", parts_of("layers", 3)),
    "two rows": ("rows", parts_of("rows", 2)),
    "three rows": ("rows", parts_of("rows", 3)),
    "layers with replicas": ("layers", parts_of("layers", 2, 2)),
    "rows with replicas": ("rows", parts_of("rows", 2, 2)),
    "layers by workers that hold everything": ("layers", [WHOLE, WHOLE]),
}


# The short form: every kind of placement, each once, in turn over both precisions and both transports; the long one has all combinations.
SHORT = {
    "replicas": ("int8", "ipc"),
    "two layers": ("int8x2", "tcp"),
    "two rows": ("int8", "ipc"),
    "three rows": ("int8x2", "tcp"),
    "rows with replicas": ("int8x2", "ipc"),
}


@pytest.mark.parametrize(
    ("name", "precision", "transport"),
    [
        pytest.param(name, precision, transport, marks=() if SHORT.get(name) == (precision, transport) else pytest.mark.long)
        for name in PLACEMENTS
        for precision in ("int8", "int8x2")
        for transport in ("ipc", "tcp")
    ],
)
def test_every_placement_writes_what_one_worker_writes(name: str, precision: str, transport: str, farm: Farm, keys: Path) -> None:
    """Bit for bit: the workers' sums are exact, whoever computes which."""
    (placement, parts), bundle = PLACEMENTS[name], demo_bundle(precision)
    tokens, scores = expected(precision)
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, *parts, keys=keys / "worker" if transport == "tcp" else None) as workers:
        addresses = [worker.address for worker in workers] if "everything" in name else seats(workers, parts)
        more: dict[str, Any] = {"keys": keys / "trusted"} if transport == "tcp" else {}
        with several(model, addresses, placement=placement, **more) as session:
            assert greedy(model, PROMPT, TOKENS) == tokens
            assert torch.equal(logits(model, PREFILL), scores)
            exchanges = session.telemetry.total().exchanges
        received = [len(worker.received()) for worker in workers]
    groups = len(bundle.manifest.exposed.groups)
    assert exchanges == (TOKENS + 1) * groups * (len(set(parts)) if placement == "rows" else 1)
    in_use = 1 if placement == "replicas" else len(addresses)
    assert all(received[:in_use]) and not any(received[in_use:])


def test_layers_are_spread_and_rows_shared(farm: Farm) -> None:
    bundle = tiny_bundle("llama")
    groups = set(range(9))
    with farm.workers(bundle.exposed, *parts_of("layers", 3), *parts_of("rows", 3)) as workers:
        for chosen, placement in ((workers[:3], "layers"), (workers[3:], "rows")):
            model = load(bundle.trusted)
            with several(model, [worker.address for worker in chosen], placement=placement):
                logits(model, IDS)
        seen = [{group for group, _ in worker.received()} for worker in workers]
    assert seen[0] | seen[1] | seen[2] == groups and sum(map(len, seen[:3])) == 9
    assert seen[3:] == [groups] * 3


# --- what the workers see


def test_two_workers_with_rows_get_the_same_c(farm: Farm) -> None:
    """One pad serves them all: putting their transcripts together tells a pair no more than each knows."""
    bundle, parts = tiny_bundle("llama"), parts_of("rows", 2)
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, *parts) as workers:
        with several(model, seats(workers, parts), placement="rows"):
            for _ in range(3):
                logits(model, IDS)
        first, second = (worker.received() for worker in workers)
    assert len(first) == 3 * 9 * 5 == len(distinct(first))
    assert [(group, row.tolist()) for group, row in first] == [(group, row.tolist()) for group, row in second]


def secrets_of(session: SlipSession, group: int) -> dict[str, Any]:
    """The halves of S ‖ −S W that check each worker's answers, by address."""
    return {address: check._test for seat in session.channel.seats for (address, number), check in seat._checks.items() if number == group}


@pytest.mark.parametrize(
    ("placement", "parts"), [pytest.param("layers", parts_of("layers", 2, 2), marks=pytest.mark.long), ("rows", parts_of("rows", 2, 2))]
)
def test_every_worker_has_its_own_secret_s(placement: str, parts: list[str], farm: Farm, impatient: None) -> None:
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, *parts) as workers:
        with several(model, seats(workers, parts), placement=placement) as session:
            logits(model, IDS)
            workers[0].kill()
            logits(model, IDS)
            for group in (0, 1):
                found = secrets_of(session, group)
                assert set(found) == {workers[index].address for index in ((0, 2) if placement == "layers" else (0, 1, 2))}
                tests = list(found.values())
                for number, one in enumerate(tests):
                    for other in tests[:number]:
                        width = min(one.shape[1], other.shape[1])
                        assert (one[:, :width] == other[:, :width]).double().mean() < 0.05
        assert all(not seat._checks for seat in session.channel.seats)  # dropped with the session


# --- kill -9


class Killer:
    """Kills the worker of one exchange: before it is asked, while it computes, or after it has answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: list[ForkedWorker]) -> None:
        self._by_address = {worker.address: worker for worker in workers}
        self._left, self._moment = -1, ""
        self.killed: ForkedWorker | None = None
        given, killer = Channel.exchange, self

        def exchange(
            channel: Channel,
            layer: str,
            request: Any,
            payload: Any,
            parse: Any,
            meanwhile: Callable[[], None] = lambda: None,
            expected: int | None = None,
        ) -> Any:
            moment = killer._next()
            if not moment:
                return given(channel, layer, request, payload, parse, meanwhile, expected)

            def kill(when: str) -> None:
                if when == moment:
                    killer.killed = killer._by_address[str(channel.address)]
                    killer.killed.kill()

            def both() -> None:
                kill("meanwhile")
                meanwhile()

            kill("before")
            result = given(channel, layer, request, payload, parse, both)
            kill("after")
            return result

        monkeypatch.setattr(Channel, "exchange", exchange)

    def arm(self, exchanges: int) -> str:
        """At one of the next `exchanges`, at random; what was drawn."""
        self.killed = None
        self._left, self._moment = secrets.randbelow(exchanges), random.choice(["before", "meanwhile", "after"])
        return f"exchange {self._left}, {self._moment}"

    def _next(self) -> str:
        self._left -= 1
        return self._moment if self._left == -1 else ""


KILLS = [3, pytest.param(50, marks=pytest.mark.long)]


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("name", ["replicas", pytest.param("layers with replicas", marks=pytest.mark.long), "rows with replicas"])
def test_sigkill_at_a_random_exchange(name: str, kills: int, farm: Farm, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of the undisturbed run, and no c reaches anybody twice: what was asked again was under fresh pads."""
    (placement, parts), bundle = PLACEMENTS[name], demo_bundle()
    tokens, _ = expected("int8")
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, *parts) as workers:
        killer = Killer(monkeypatch, workers)
        with several(model, seats(workers, parts), placement=placement) as session:
            length = len(greedy(model, PROMPT, TOKENS)) * len(bundle.manifest.exposed.groups) * (2 if placement == "rows" else 1)
            runs = 1
            for _ in range(kills):
                drawn = killer.arm(length)
                started = time.monotonic()
                assert greedy(model, PROMPT, TOKENS) == tokens, drawn
                assert time.monotonic() - started < 20, drawn
                assert killer.killed is not None and not killer.killed.alive, drawn
                if drawn.endswith("after"):
                    greedy(model, PROMPT, 1)  # whoever was killed at the last exchange is missed now
                    runs += 1
                killer.killed.start()
                runs += 1
            assert not session.closed and session.telemetry.total().resent == 0
            pads = {source.made for source in session.pads}
        received = {
            part: [row for worker, one in zip(workers, parts, strict=True) if one == part for row in worker.received()] for part in parts
        }
    sets = {part: distinct(rows) for part, rows in received.items()}
    for part, rows in received.items():
        assert len(sets[part]) == len(rows), f"{part}: a row was sent twice"
    if placement == "rows":  # the same c, except where one of them was dead
        first, second = sets.values()
        assert len(first & second) >= 0.9 * max(len(first), len(second)) and len(first ^ second) > 0
    assert min(pads) >= runs


@pytest.mark.long  # in the short form the same command is forked (see `forked_workers`)
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_real_commands_killed_by_a_thread(transport: str, keys: Path, tmp_path: Path, socket_folder: Path, impatient: None) -> None:
    """`cloven worker` as it is started in earnest, SIGKILL at a random time, on both transports."""
    bundle = demo_bundle()
    tokens, _ = expected("int8")
    model = load(bundle.trusted)
    places = [f"tcp://127.0.0.1:{free_port()}" if transport == "tcp" else f"ipc://{socket_folder}/{name}" for name in "ab"]
    more = ["--keys", str(keys / "worker")] if transport == "tcp" else []
    options: dict[str, Any] = {"keys": keys / "trusted"} if transport == "tcp" else {}
    a, b = (WorkerProcess(bundle.exposed, place, "--threads", "1", *more) for place in places)
    with a, b, several(model, places, **options) as session:
        timer = threading.Timer(random.uniform(0.02, 0.2), a.kill)
        timer.start()
        written = [greedy(model, PROMPT, TOKENS) for _ in range(3)]
        timer.join()
        written.append(greedy(model, PROMPT, TOKENS))
        assert written == [tokens] * 4 and session.channel.address == places[1]


def test_there_and_back_and_nowhere(farm: Farm, impatient: None) -> None:
    bundle = demo_bundle()
    tokens, _ = expected("int8")
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, WHOLE, WHOLE) as (a, b), several(model, [a.address, b.address]) as session:
        assert greedy(model, PROMPT, TOKENS) == tokens and session.channel.address == a.address
        a.kill()
        assert greedy(model, PROMPT, TOKENS) == tokens and session.channel.address == b.address
        a.start()
        b.kill()
        assert greedy(model, PROMPT, TOKENS) == tokens and session.channel.address == a.address
        a.kill()
        started = time.monotonic()
        with pytest.raises(WorkerUnreachable, match=r"model\.layers\.0.*no worker at ipc.*no replica of it answers either") as caught:
            greedy(model, PROMPT, TOKENS)
        assert time.monotonic() - started < 10 and "tensor" not in str(caught.value) + repr(session)
        assert not session.closed
        for one in (b, a):
            one.start()
            assert greedy(model, PROMPT, TOKENS) == tokens and session.channel.address == one.address
            one.kill()
        received = a.received() + b.received()
    assert len(distinct(received)) == len(received)


def test_a_part_without_a_replica(farm: Farm) -> None:
    """The error is that of one worker, and the session waits for it as for one worker."""
    bundle, parts = demo_bundle(), [*parts_of("layers", 2), "layers:1/2"]
    tokens, _ = expected("int8")
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, *parts) as workers, several(model, seats(workers, parts), placement="layers") as session:
        session.channel.timeout = 0.6
        workers[1].kill()
        with pytest.raises(WorkerUnreachable, match=rf"no worker at {workers[1].address} for 0\.6 s: is `cloven worker` running") as caught:
            greedy(model, PROMPT, TOKENS)
        assert "replica" not in str(caught.value)
        workers[1].start()
        session.channel.timeout = 20.0
        assert greedy(model, PROMPT, TOKENS) == tokens


def test_a_replica_that_is_absent_at_the_start(farm: Farm, impatient: None) -> None:
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, WHOLE, WHOLE) as (a, b):
        a.kill()
        with several(model, [a.address, b.address]) as session:
            assert session.channel.address == b.address
            before = logits(model, IDS)
            a.start()
            b.kill()
            assert torch.equal(logits(model, IDS), before) and session.channel.address == a.address
        a.kill()
        started = time.monotonic()
        with pytest.raises(WorkerUnreachable):
            cloven.attach(model, [a.address, b.address])
        assert time.monotonic() - started < 10


def test_two_threads_of_one_session(farm: Farm, impatient: None) -> None:
    """One of them moves, the other follows; both go on."""
    bundle = demo_bundle()
    tokens, _ = expected("int8")
    model = load(bundle.trusted)
    written: list[list[int]] = []
    failed: list[BaseException] = []
    with farm.workers(bundle.exposed, WHOLE, WHOLE) as (a, b), several(model, [a.address, b.address]) as session:

        def write() -> None:
            try:
                for _ in range(2):
                    written.append(greedy(model, PROMPT, TOKENS))
            except BaseException as error:
                failed.append(error)

        for victim in (a, b):
            threads = [threading.Thread(target=write) for _ in range(2)]
            done = session.telemetry.total().exchanges
            for thread in threads:
                thread.start()
            while session.telemetry.total().exchanges < done + 30:
                time.sleep(0.002)
            victim.kill()
            for thread in threads:
                thread.join(60)
            assert not failed and written == [tokens] * 4, failed
            written.clear()
            victim.start()
        received = a.received() + b.received()
    assert len(distinct(received)) == len(received)


# --- a worker that hangs


def test_sigstop(farm: Farm, impatient: None) -> None:
    """It moves after the timeout; the hanging worker's late answers reach nobody."""
    bundle, parts = demo_bundle(), [WHOLE, WHOLE]
    tokens, _ = expected("int8")
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, *parts) as (a, b), several(model, [a.address, b.address], timeout=15) as session:
        assert greedy(model, PROMPT, TOKENS) == tokens
        session.channel.timeout = 0.7
        a.send(signal.SIGSTOP)
        started = time.monotonic()
        assert greedy(model, PROMPT, TOKENS) == tokens
        assert 0.6 < time.monotonic() - started < 5 and session.channel.address == b.address
        assert session.channel.timeout == 0.7  # what was set is set for the replica too
        a.send(signal.SIGCONT)
        session.channel.timeout = 15.0
        b.kill()
        assert greedy(model, PROMPT, TOKENS) == tokens and session.channel.address == a.address
        received = a.received() + b.received()
    assert len(distinct(received)) == len(received)


# --- lies


@pytest.mark.parametrize("lie_at", [1, 4])
def test_a_replica_that_lies(
    lie_at: int, farm: Farm, socket_folder: Path, context: zmq.Context[zmq.Socket[bytes]], impatient: None
) -> None:
    """A wrong answer is no failure of a machine: the session ends, and no third worker is asked."""
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    places = [f"ipc://{socket_folder}/{name}" for name in ("liar", "third")]
    with (
        farm.workers(bundle.exposed, WHOLE) as (honest,),
        FakeWorker(context, places[0], Liar(bundle.exposed, lie_at)) as liar,
        FakeWorker(context, places[1], Liar(bundle.exposed, 0)) as third,
        several(model, [honest.address, *places]) as session,
    ):
        logits(model, IDS)
        honest.kill()
        with pytest.raises(VerificationFailed, match=r"model\.layers\.0\..*: the worker's answer is wrong in 1 of 5 rows"):
            logits(model, IDS)
        assert session.closed and len(liar.received) == 2 + lie_at and third.received == []
        with pytest.raises(SessionClosed, match="worker's answer is wrong"):
            logits(model, IDS)
        assert len(liar.received) == 2 + lie_at and third.received == []
        assert all(not seat._checks for seat in session.channel.seats) and not session.offloaded and not session.pads


# --- placements that do not fit


@pytest.mark.parametrize(
    ("held", "placement", "count", "says"),
    [
        ("layers:1/2", "rows", 2, r"holds part layers:1/2; this placement needs one with --part rows:1/2"),
        pytest.param(
            "rows:1/2", "layers", 2, r"holds part rows:1/2; this placement needs one with --part layers:1/2", marks=pytest.mark.long
        ),
        ("layers:2/3", "layers", 2, r"holds part layers:2/3; this placement needs one with --part layers:1/2"),
        pytest.param(
            "layers:2/2", "layers", 2, r"holds part layers:2/2; this placement needs one with --part layers:1/2", marks=pytest.mark.long
        ),
        pytest.param(
            "layers:2/3", "replicas", 1, r"holds part layers:2/3; this placement needs one with no --part", marks=pytest.mark.long
        ),
        ("rows:1/2", "replicas", 2, r"holds part rows:1/2; this placement needs one with no --part"),
        ("", "rows", 2, r"holds everything; the placement by rows needs one with --part rows:1/2"),
    ],
)
def test_a_changed_placement(held: str, placement: str, count: int, says: str, farm: Farm, cloven_here: Command) -> None:
    bundle = tiny_bundle("llama")
    with farm.workers(bundle.exposed, held, held) as workers:
        addresses = [worker.address for worker in workers[:count]]
        with pytest.raises(BadInput, match=says) as caught:
            cloven.attach(load(bundle.trusted), addresses, placement=placement, timeout=10)
        assert caught.value.exit_code == 2 and addresses[0] in str(caught.value)
        assert not any(worker.received() for worker in workers)
        asked = [option for address in addresses for option in ("--worker", address)]
        bundle = demo_bundle()
    if held == "layers:1/2":
        with farm.workers(bundle.exposed, held, held) as workers:
            asked = [option for worker in workers for option in ("--worker", worker.address)]
            outcome = cloven_here("generate", str(bundle.trusted), *asked, "--placement", placement, "--prompt", PROMPT)
            one_line(outcome, 2, says)


def test_a_placement_that_changes_while_it_runs(farm: Farm, impatient: None) -> None:
    """The replica holds another part: a clear error when it is needed, and nothing is asked of it."""
    bundle, parts = tiny_bundle("llama"), ["layers:1/2", "layers:2/2", "layers:1/2"]
    model = load(bundle.trusted)
    with farm.workers(bundle.exposed, *parts) as workers:
        first, second, wrong = (worker.address for worker in workers)
        with several(model, [first, f"{second},{wrong}"], placement="layers") as session:
            before = logits(model, IDS)
            workers[1].kill()
            with pytest.raises(BadInput, match=r"holds part layers:1/2; this placement needs one with --part layers:2/2"):
                logits(model, IDS)
            assert not session.closed and workers[2].received() == []
            workers[1].start()
            assert torch.equal(logits(model, IDS), before)


def test_a_replica_of_another_bundle(farm: Farm, impatient: None) -> None:
    mine, other = tiny_bundle("llama"), tiny_bundle("qwen2")
    model = load(mine.trusted)
    with farm.workers(mine.exposed, WHOLE) as (a,), farm.workers(other.exposed, WHOLE) as (b,):
        with pytest.raises(ForeignBundle, match=other.id):
            cloven.attach(model, [b.address, a.address])
        with several(model, [a.address, b.address]) as session:
            a.kill()
            with pytest.raises(ForeignBundle, match=other.id) as caught:
                logits(model, IDS)
            assert caught.value.exit_code == 3 and session.closed and b.received() == []


def of_version(version: int) -> Callable[[list[bytes]], list[list[bytes]]]:
    """A worker of another version, as it answers whatever it does not know."""

    def answer(frames: list[bytes]) -> list[list[bytes]]:
        request = msgpack.unpackb(frames[0])
        text = f"this side speaks wire version {version} only"
        return [[msgpack.packb({"v": version, "type": "error", "id": request["id"], "code": "version", "text": text})]]

    return answer


@pytest.mark.parametrize("version", [2, pytest.param(5, marks=pytest.mark.long)])
def test_a_worker_of_another_version(
    version: int, farm: Farm, socket_folder: Path, context: zmq.Context[zmq.Socket[bytes]], cloven_here: Command, impatient: None
) -> None:
    bundle, address = demo_bundle(), f"ipc://{socket_folder}/old"
    model = load(bundle.trusted)
    says = r"speaks another wire version \(this side speaks wire version 5 only\): install the same cloven on both sides"
    with FakeWorker(context, address, of_version(version)) as old, farm.workers(bundle.exposed, WHOLE) as (a,):
        for addresses in ([address], [address, a.address]):
            started = time.monotonic()
            with pytest.raises(WorkerRefused, match=says) as caught:
                cloven.attach(model, addresses)
            assert time.monotonic() - started < 10 and caught.value.exit_code == 1
        with several(model, [a.address, address]):
            a.kill()
            with pytest.raises(WorkerRefused, match=says):
                greedy(model, PROMPT, TOKENS)
        one_line(cloven_here("generate", str(bundle.trusted), "--worker", address, "--prompt", PROMPT), 1, says)
        assert all(len(frames) == 1 for frames in old.received)  # nothing but greetings


def test_addresses_that_cannot_be(farm: Farm, cloven_here: Command) -> None:
    bundle = demo_bundle()
    with farm.workers(bundle.exposed, WHOLE) as (a,):
        for asked, says in (
            (["--worker", a.address, "--worker", a.address], "a worker's address is given twice"),
            (["--worker", f"{a.address},{a.address}"], "a worker's address is given twice"),
            (["--worker", a.address, "--placement", "tensor"], "placement 'tensor': choose one of replicas, layers, rows"),
            (["--worker", ","], "give the worker's address"),
            (["--worker", a.address, "--worker", "nonsense", "--placement", "layers"], "'nonsense' is no address"),
        ):
            one_line(cloven_here("generate", str(bundle.trusted), *asked, "--prompt", PROMPT), 2, says)
        many = [f"ipc://{farm.folder}/x{number}" for number in range(22)]
        asked = [option for one in many for option in ("--worker", one)]
        started = time.monotonic()
        outcome = cloven_here("generate", str(bundle.trusted), *asked, "--placement", "layers", "--prompt", PROMPT)
        one_line(outcome, 2, r"placement 'layers' over 22 workers: this bundle can be spread over 21 at most")
        assert time.monotonic() - started < 5 and a.received() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--part", "layers:3/2"], "part 'layers:3/2': give layers:NUMBER/OF"),
        (["--part", "columns:1/2"], "part 'columns:1/2'"),
        (["--part", "layers:1/22"], "can be spread over 21 at most"),
        (["--replicas", "2"], "--replicas and --placement belong to --engine ray"),
        (["--placement", "rows"], "--replicas and --placement belong to --engine ray"),
        (["--engine", "ray", "--part", "rows:1/2"], "--part, --record, --threads and --metrics-port belong to one process"),
        (["--engine", "dask"], "engine: choose process or ray"),
        (["--engine", "ray", "--placement", "tensor"], "placement: layers or rows"),
    ],
)
def test_arguments_of_a_worker(arguments: list[str], says: str, socket_folder: Path, cloven_here: Command) -> None:
    outcome = cloven_here("worker", str(demo_bundle().exposed), "--listen", f"ipc://{socket_folder}/w", *arguments)
    one_line(outcome, 2, says)


# --- a pad store


@pytest.mark.parametrize(
    ("placement", "parts"), [("replicas", [WHOLE, WHOLE]), pytest.param("layers", parts_of("layers", 2, 2), marks=pytest.mark.long)]
)
def test_a_pad_store_and_replicas(placement: str, parts: list[str], farm: Farm, tmp_path: Path, impatient: None) -> None:
    """No copy of the exposed half is needed, the pads of the lost exchanges are burnt, and no index is used twice, over sessions too."""
    bundle = tiny_bundle("llama")
    trusted, store = tmp_path / "out" / "trusted", tmp_path / "pads"
    shutil.copytree(bundle.trusted, trusted)
    fill(fill_job(trusted, 300, store, bundle.exposed))
    model = load(trusted)
    with farm.workers(bundle.exposed, *parts) as workers:
        reference = load(bundle.trusted)
        with several(reference, seats(workers, parts), placement=placement):
            right = logits(reference, IDS)
        before = len(distinct([row for worker in workers for row in worker.received()]))
        for _ in range(2):
            with several(model, seats(workers, parts), placement=placement, pads=store, look_ahead=8):
                for victim in (workers[0], workers[len(parts) // 2]):
                    assert torch.equal(logits(model, IDS), right)
                    victim.kill()
                    assert torch.equal(logits(model, IDS), right)
                    victim.start()
        received = [row for worker in workers for row in worker.received()]
    # ours: 8 forward passes of 5 rows through 9 groups, and what was asked again
    assert len(distinct(received)) == len(received) >= before + 8 * 9 * 5
    opened = PadStore(store, bundle.id)
    status = opened.status()
    opened.close()
    assert all(one.reused == 0 for one in status)
    assert all(one.used >= 8 * 5 and one.used + one.burnt + one.left == one.filled for one in status)
    assert sum(one.used for one in status) > 8 * 9 * 5  # pads of lost exchanges are used up as well


def test_a_store_has_a_secret_s_for_every_worker(farm: Farm, tmp_path: Path, impatient: None) -> None:
    bundle = tiny_bundle("llama")
    trusted, store = tmp_path / "out" / "trusted", tmp_path / "pads"
    shutil.copytree(bundle.trusted, trusted)
    fill(fill_job(trusted, 50, store, bundle.exposed))
    model = load(trusted)
    with farm.workers(bundle.exposed, WHOLE, WHOLE) as (a, b), several(model, [a.address, b.address], pads=store) as session:
        logits(model, IDS)
        a.kill()
        logits(model, IDS)
        found = secrets_of(session, 0)
        assert set(found) == {a.address, b.address}
        assert (found[a.address] == found[b.address]).double().mean() < 0.05


# --- the command line


def test_generate_with_several_workers(farm: Farm, impatient: None, cloven_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, parts = demo_bundle(), parts_of("layers", 2, 2)
    tokens, _ = expected("int8")
    common = ["generate", str(bundle.trusted), "--prompt", PROMPT, "--max-new-tokens", str(TOKENS), "--dtype", "float32", "--json"]
    common += ["--placement", "layers"]
    with farm.workers(bundle.exposed, *parts) as workers:
        first, second = seats(workers, parts)
        outcomes = [cloven_here(*common, "--worker", first, "--worker", second)]
        workers[0].kill()
        monkeypatch.setenv("CLOVEN_WORKER", f"{first} {second}")
        outcomes.append(cloven_here(*common))
        workers[2].kill()
        one_line_at_the_end = cloven_here(*common, "--worker", first, "--worker", second)
    for outcome in outcomes:
        assert outcome.code == 0 and json.loads(outcome.out)["tokens"] == tokens, outcome.err
    assert one_line_at_the_end.code == 1 and "is `cloven worker` running there" in one_line_at_the_end.err
    assert "Traceback" not in one_line_at_the_end.err


@pytest.mark.long
def test_generate_over_a_death(farm: Farm, cloven_here: Command) -> None:
    """The command, from outside: it is in the middle of a text when its worker is killed."""
    bundle = demo_bundle()
    with farm.workers(bundle.exposed, WHOLE, WHOLE) as (a, b):
        command = [sys.executable, "-m", "cloven", "generate", str(bundle.trusted), "--prompt", PROMPT, "--max-new-tokens", "40"]
        process = subprocess.Popen(
            [*command, "--worker", a.address, "--worker", b.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        begin = process.stdout.read(1)
        a.kill()
        out, errors = process.communicate(timeout=60)
        alone = cloven_here(*command[3:], "--worker", b.address)
    assert process.returncode == 0 and begin + out == alone.out
    assert errors.count("\n") == 1 and f"{a.address} is gone: its part of the bundle moves to {b.address}" in errors
