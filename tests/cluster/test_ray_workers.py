"""Workers as Ray actors on a real local Ray, which all tests here share: it is slow to start."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cloven.cluster import ray_workers
from cloven.cluster.ray_workers import RayWorkers, _address
from cloven.engine.ray import start_ray
from cloven.errors import BadBundle, BadInput, RunError, WorkerUnreachable
from cloven.slip import workers as workers_module
from cloven.wire.channel import Channel
from cloven.wire.keys import generate_keys, trusted_keys
from tests.end_to_end.test_worker_imports import FORBIDDEN
from tests.helpers import free_port, random_codes, write_exposed
from tests.split_models import load, logits, open_session, random_ids, tiny_bundle, worker_thread

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
IDS = random_ids(97, 1, 5)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """With two cores, whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves files open and warns of its own deprecations
        patch.delenv("RAY_ADDRESS", raising=False)
        module = start_ray(processes=2)
        try:
            yield module
        finally:
            module.shutdown()


def listens(address: str) -> bool:
    kind, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    with socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET) as probe:
        return probe.connect_ex(place if kind == "ipc" else (host, int(port))) == 0


def ended(address: str) -> bool:
    """Within some seconds: actors are killed, and Ray says nothing of when."""
    deadline = time.monotonic() + 60
    while listens(address) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not listens(address)


def running(ray: Any) -> int:
    """Cores that are not free."""
    return int(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0))


def all_free(ray: Any) -> bool:
    deadline = time.monotonic() + 60
    while running(ray) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not running(ray)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    with worker_thread(bundle) as address, open_session(model, address):
        return logits(model, IDS)


# --- addresses


def test_every_worker_has_an_address_of_its_own() -> None:
    assert [_address("ipc:///run/me/w", index) for index in range(2)] == ["ipc:///run/me/w-1", "ipc:///run/me/w-2"]
    assert [_address("tcp://*:7000", index) for index in range(3)] == ["tcp://*:7000", "tcp://*:7001", "tcp://*:7002"]
    assert _address("tcp://[::1]:7000", 1) == "tcp://[::1]:7001"


@pytest.mark.parametrize("listen", ["7000", "tcp://*", "tcp://host:port", "http://host:7000", "tcp://host:700000", ""])
def test_no_addresses(listen: str) -> None:
    """Before Ray is started."""
    with pytest.raises(BadInput, match="is no address: use ipc://PATH or tcp://HOST:PORT"):
        RayWorkers(Path("/nowhere"), listen, 2)


# --- actors


@pytest.mark.parametrize(
    ("placement", "text"),
    [pytest.param("", ",", marks=pytest.mark.long), ("layers", " "), pytest.param("rows", " ", marks=pytest.mark.long)],
)
def test_actors_serve_and_end(
    ray: Any, placement: str, text: str, socket_folder: Path, expected: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, as each actor takes seconds to start: what they import, and what they are given. Nothing that handles secrets is imported after
    an answer: whoever takes the cluster over finds no use for it there. Ray's object store is plaintext: the worker's key stays in its
    file."""
    from ray import cloudpickle

    generate_keys(tmp_path / "keys")
    sent, given = [], cloudpickle.dumps

    def dumps(value: Any, *more: Any, **options: Any) -> bytes:
        data: bytes = given(value, *more, **options)
        sent.append(data)
        return data

    monkeypatch.setattr(cloudpickle, "dumps", dumps)
    modules = eval("lambda self: sorted(__import__('sys').modules)", {"__name__": "__main__"})  # pickled by value: no test is imported
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    with RayWorkers(bundle.exposed, f"ipc://{socket_folder}/w", 2, placement=placement, keys=tmp_path / "keys" / "worker") as workers:
        assert workers.addresses == [f"ipc://{socket_folder}/w-1", f"ipc://{socket_folder}/w-2"]
        for number, address in enumerate(workers.addresses, start=1):
            channel = Channel(address, bytes.fromhex(bundle.id), keys=trusted_keys(tmp_path / "keys" / "trusted"), timeout=10)
            assert channel.hello() == 9 and channel.part == (f"{placement}:{number}/2" if placement else "")
            channel.close()
        keys = tmp_path / "keys" / "trusted"
        with open_session(model, text.join(workers.addresses), placement=placement or "replicas", keys=keys):
            assert torch.equal(logits(model, IDS), expected)
        assert running(ray) == 2
        imported = ray.get(workers._actors[0].__ray_call__.remote(modules), timeout=30)
    key = ray_workers_key(tmp_path / "keys" / "worker")
    assert sent and len(key) == 32 and not any(key in data for data in sent)
    assert {"torch", "zmq", "cloven.worker.service", "cloven.field.products", "cloven.cluster.ray_workers"} <= set(imported)
    assert [name for name in imported if any(name == one or name.startswith(one + ".") for one in FORBIDDEN)] == []
    assert all(ended(address) for address in workers.addresses) and all_free(ray)
    workers.stop()  # twice is harmless


def test_an_actor_that_dies_is_replaced_by_its_replica(
    ray: Any, expected: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over tcp with keys, as between machines; the star stands for the node's own address."""
    monkeypatch.setattr(workers_module, "PATIENCE", 0.4)
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    generate_keys(tmp_path / "keys")
    port = free_port()
    with RayWorkers(bundle.exposed, f"tcp://*:{port}", 2, keys=tmp_path / "keys" / "worker") as workers:
        assert workers.addresses == [f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}"]
        with open_session(model, " ".join(workers.addresses), keys=tmp_path / "keys" / "trusted") as session:
            assert torch.equal(logits(model, IDS), expected)
            ray.kill(workers._actors[0])
            assert ended(workers.addresses[0])
            assert torch.equal(logits(model, IDS), expected) and session.channel.address == workers.addresses[1]
            ray.kill(workers._actors[1])
            assert ended(workers.addresses[1])
            with pytest.raises(WorkerUnreachable, match="no replica of it answers either"):
                logits(model, IDS)


def ray_workers_key(folder: Path) -> bytes:
    from zmq.utils import z85

    from cloven.wire.keys import worker_keys

    secret = worker_keys(folder).own.secret
    return secret if len(secret) == 32 else z85.decode(secret)


# --- what goes wrong


def test_more_workers_than_cores(ray: Any, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for ever; those that had started end."""
    assert 60 <= ray_workers._START_SECONDS <= 300  # a node may have to be started first
    monkeypatch.setattr(ray_workers, "_START_SECONDS", 3.0)
    started = time.monotonic()
    with pytest.raises(
        RunError, match=r"^3 workers could not be started on Ray \(GetTimeoutError\): each needs a core of its own$"
    ) as caught:
        RayWorkers(tiny_bundle("llama").exposed, f"ipc://{socket_folder}/w", 3)
    assert time.monotonic() - started < 20 and caught.value.exit_code == 1
    assert all_free(ray) and all(ended(f"ipc://{socket_folder}/w-{number}") for number in (1, 2, 3))


@pytest.mark.long
def test_no_gpu(ray: Any, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(ray_workers, "_START_SECONDS", 1.0)
    with pytest.raises(RunError, match="each needs a core of its own and a GPU"):
        RayWorkers(tiny_bundle("llama").exposed, f"ipc://{socket_folder}/w", 1, device="cuda")


def test_an_actor_that_cannot_start_says_why(ray: Any, socket_folder: Path, tmp_path: Path) -> None:
    """The error of `cloven worker`, of its kind, and not Ray's."""
    with pytest.raises(BadBundle, match="is no bundle half") as caught:
        RayWorkers(tmp_path / "nowhere", f"ipc://{socket_folder}/w", 1)
    assert caught.value.exit_code == 2
    assert all_free(ray)


@pytest.mark.long
def test_more_actors_that_cannot_start(ray: Any, socket_folder: Path, tmp_path: Path) -> None:
    exposed = tiny_bundle("llama").exposed
    write_exposed(tmp_path / "exposed", [random_codes(4, 4)])
    with pytest.raises(BadInput, match="placement 'layers' over 2 workers: this bundle can be spread over 1 at most"):
        RayWorkers(tmp_path / "exposed", f"ipc://{socket_folder}/w", 2, placement="layers")
    with pytest.raises(BadInput, match="tcp needs keys"):
        RayWorkers(exposed, f"tcp://127.0.0.1:{free_port()}", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunError, match="cannot listen at tcp"):
            RayWorkers(exposed, f"tcp://127.0.0.1:{taken.getsockname()[1]}", 1, insecure_plain_tcp=True)
    assert all_free(ray)


def test_a_bug_is_named_without_its_message(ray: Any, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}  # pickled by value
    exec("class Broken:\n    def start(self, *given):\n        raise ZeroDivisionError('with a secret')", names)
    monkeypatch.setattr(ray_workers, "_Actor", names["Broken"])
    with pytest.raises(RunError, match=r"^a worker could not be started on Ray: ZeroDivisionError$"):
        RayWorkers(tiny_bundle("llama").exposed, f"ipc://{socket_folder}/w", 1)
    assert all_free(ray)


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, socket_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"needs Ray: pip install 'cloven\[ray\]'"):
        RayWorkers(tiny_bundle("llama").exposed, f"ipc://{socket_folder}/w", 2)


# --- the command, which has no Ray yet


def command(socket_folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "cloven", "worker", str(tiny_bundle("llama").exposed), "--listen", f"ipc://{socket_folder}/w"]
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [*line, "--engine", "ray", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | environment,
    )


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_prints_addresses_and_ends(number: int, socket_folder: Path, expected: torch.Tensor) -> None:
    bundle = tiny_bundle("llama")
    model = load(bundle.trusted)
    with command(socket_folder, "--replicas", "2", "--placement", "layers") as process:
        assert process.stdout is not None
        addresses = [process.stdout.readline().strip() for _ in range(2)]
        try:
            assert addresses == [f"ipc://{socket_folder}/w-{index}" for index in (1, 2)]
            with open_session(model, " ".join(addresses), placement="layers"):
                assert torch.equal(logits(model, IDS), expected)
        finally:
            process.send_signal(number)
            out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "Traceback" not in errors
    assert all(ended(address) for address in addresses)


def test_a_cluster_that_is_not_there(socket_folder: Path) -> None:
    started = time.monotonic()
    with command(socket_folder, RAY_ADDRESS=f"127.0.0.1:{free_port()}") as process:
        out, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 45 and process.returncode == 1 and out == ""
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("cloven: the Ray cluster at RAY_ADDRESS=127.0.0.1:"), errors
    with contextlib.suppress(FileNotFoundError):
        assert list(socket_folder.iterdir()) == []
