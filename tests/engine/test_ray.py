"""Ray, really: a local cluster with two workers, bound to localhost. Slow to start, so that everything here shares one."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloven.engine import ray as ray_module
from cloven.engine.engine import Inline, select_engine
from cloven.engine.ray import RayEngine, start_ray
from cloven.errors import BadInput, RunError
from cloven.slip.prepare import prepare_slip
from tests.engine.tasks import break_at_two, compute, die_at_two, fail_at_two, fail_while_others_last_long, jobs, note, noted
from tests.helpers import free_port
from tests.preparations import Stop as Interruption
from tests.preparations import again, edit_weights, hashes, key_of, own_folder, reference, stop_at

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ray leaves files open and warns of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Started as `start_ray` starts it, with two cores whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.delenv("RAY_ADDRESS", raising=False)
        module = start_ray(processes=2)
        try:
            yield module
        finally:
            processes = of_ray()
            module.shutdown()
        assert processes and ended(processes)  # nothing of Ray is left


@pytest.fixture
def engine(ray: Any) -> RayEngine:
    return RayEngine(2**20)


def ended(processes: list[psutil.Process]) -> bool:
    """Within some seconds."""
    deadline = time.monotonic() + 30
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def of_ray() -> list[psutil.Process]:
    """Ray's processes: this one's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if re.search(r"\bray|raylet|gcs_server", " ".join(process.cmdline())):
                found.append(process)
    return found


def test_two_workers(ray: Any, engine: RayEngine, tmp_path: Path) -> None:
    assert ray.cluster_resources()["CPU"] == 2
    given = jobs(tmp_path, 6)
    done = list(engine.run(note, given))
    assert sorted(done, key=lambda job: job.number) == given
    notes = noted(given)
    assert {entry["threads"] for entry in notes} == {1}
    assert os.getpid() not in {entry["process"] for entry in notes}


def test_every_socket_is_on_localhost(engine: RayEngine, tmp_path: Path) -> None:
    """Ray's ports mean code execution for whoever reaches them."""
    list(engine.run(note, jobs(tmp_path, 4)))
    listening = set()
    processes = of_ray()
    for process in [psutil.Process(), *processes]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections(kind="inet"):
                assert ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:")).is_loopback, (process.name(), connection)
                if connection.status == psutil.CONN_LISTEN:
                    listening.add((process.name(), connection.laddr.port))
    assert len(processes) >= 3 and len(listening) >= 3, (processes, listening)  # the head, the raylet, the workers: it was looked at


def test_no_dashboard_and_no_usage_statistics(ray: Any) -> None:
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    for process in of_ray():  # there is a process of that name, which serves nobody
        with contextlib.suppress(psutil.NoSuchProcess):  # or has just ended
            if "dashboard/dashboard.py" in " ".join(process.cmdline()):
                assert not [entry for entry in process.net_connections(kind="inet") if entry.status == psutil.CONN_LISTEN]


def test_it_is_started_once(ray: Any) -> None:
    assert start_ray() is ray and type(select_engine("ray", 1, 2**20)) is RayEngine


def test_the_bits_are_those_of_this_process(engine: RayEngine, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = jobs(tmp_path / "here", 3), jobs(tmp_path / "there", 3)
    list(Inline().run(compute, here))
    list(engine.run(compute, there))
    assert [job.path.read_text() for job in here] == [job.path.read_text() for job in there]


def test_the_first_error_ends_it(engine: RayEngine, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^number two is bad$") as caught:
        list(engine.run(fail_at_two, jobs(tmp_path, 4)))
    assert caught.value.exit_code == 2


def test_an_error_does_not_wait_for_jobs_that_last_long(ray: Any, engine: RayEngine, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(BadInput, match="number zero is bad"):
        list(engine.run(fail_while_others_last_long, jobs(tmp_path, 2)))
    list(engine.run(note, jobs(tmp_path, 3)))  # both cores are free again
    assert time.monotonic() - started < 60


def test_a_bug_is_named_without_its_message(engine: RayEngine, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^a job failed on Ray: ZeroDivisionError$"):
        list(engine.run(break_at_two, jobs(tmp_path, 4)))


@pytest.mark.long  # Ray tries three times, and waits in between
def test_a_process_that_dies(engine: RayEngine, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Ray lost a job \(\w+\): run the same command again to go on"):
        list(engine.run(die_at_two, jobs(tmp_path, 4)))


def test_more_memory_than_the_cluster_has(ray: Any, tmp_path: Path) -> None:
    """A task that asks for more than there is would wait for ever."""
    assert len(list(RayEngine(2**50).run(note, jobs(tmp_path, 2)))) == 2


# --- a preparation


def test_another_engine_goes_on_where_ray_stopped(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        again(tmp_path / "out", engine="ray", progress=stop_at(14))
    assert list((tmp_path / ".out.partial" / ".work").glob("split-*"))
    assert hashes(again(tmp_path / "out").path) == hashes(reference().path)


def test_weights_that_are_no_numbers(ray: Any, tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "model")
    edit_weights(folder, lambda held: held["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(BadInput, match=r"^model\.layers\.1\.mlp\.up_proj: the weight holds NaN or infinity$"):
        prepare_slip(folder, tmp_path / "out", engine="ray")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_same_bundle_and_no_keys_in_tasks(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's object store is plaintext: whatever goes there is pickled first."""
    from ray import cloudpickle

    sent, given = [], cloudpickle.dumps

    def dumps(value: Any, *more: Any, **options: Any) -> bytes:
        data: bytes = given(value, *more, **options)
        sent.append(data)
        return data

    monkeypatch.setattr(cloudpickle, "dumps", dumps)
    bundle = again(tmp_path / "out", engine="ray")
    assert hashes(bundle.path) == hashes(reference().path)
    assert sent
    key = json.loads(key_of(reference()).read_text())["key"]
    assert not any(key.encode() in data or bytes.fromhex(key) in data for data in sent)


# --- what goes wrong before anything runs: in processes of their own, which have no Ray yet


def prepared(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "cloven", "prepare", "slip", str(own_folder(tmp_path / "model")), str(tmp_path / "out")),
            *("--no-public-relative", "--engine", "ray"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.mark.long  # in the short form tests/cluster/test_ray_workers.py has the worker's
def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    result = prepared(tmp_path, RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    assert result.returncode == 1, result.stderr
    assert re.search(r"cloven: .*the Ray cluster at RAY_ADDRESS=127\.0\.0\.1:\d+ cannot be reached .*ray start --head", result.stderr)
    assert "Traceback" not in result.stderr


class FakeRay:
    """The module `ray`, which fails, or does not do what it was told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.options, self.ended, self.util = error, {}, False, self

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.options = options
        if self.error:
            raise self.error

    def get_node_ip_address(self) -> str:
        return "192.0.2.7"

    def shutdown(self) -> None:
        self.ended = True


@pytest.mark.parametrize("address", [None, "local", "auto"])
def test_whatever_ray_raises_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    fake = FakeRay(ConnectionError("with details nobody needs"))
    monkeypatch.setattr(ray_module.importlib, "import_module", lambda name: fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    what = "RAY_ADDRESS=auto cannot be reached" if address == "auto" else "a local Ray cluster cannot be started"
    with pytest.raises(RunError, match=rf"{what} \(ConnectionError\).*ray start.*another --engine") as caught:
        start_ray()
    assert "nobody needs" not in str(caught.value)
    assert fake.options.get("_node_ip_address") == (None if address == "auto" else "127.0.0.1")


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "localhost:{port}"])
def test_nobody_listens_there(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Ray itself would end the process, after a minute."""
    fake = FakeRay()
    monkeypatch.setattr(ray_module.importlib, "import_module", lambda name: fake)
    monkeypatch.setenv("RAY_ADDRESS", address.format(port=free_port()))
    with pytest.raises(RunError, match=r"cannot be reached \(ConnectionRefusedError\)"):
        start_ray()
    assert fake.options == {}


def test_a_cluster_that_others_reach_is_ended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray that was imported earlier does not heed the setting that keeps it on localhost."""
    fake = FakeRay()
    monkeypatch.setattr(ray_module.importlib, "import_module", lambda name: fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunError, match="does not stay on localhost"):
        start_ray()
    assert fake.ended


def test_ray_that_is_not_installed_costs_an_unfinished_preparation_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interruption):
        again(tmp_path / "out", progress=stop_at(14))
    before = hashes(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match="pip install"):
        again(tmp_path / "out", engine="ray")
    with pytest.raises(BadInput, match="choose one of"):
        again(tmp_path / "out", engine="poool")
    assert hashes(tmp_path) == before
    assert hashes(again(tmp_path / "out").path) == hashes(reference().path)


@pytest.mark.long  # in the short form the fixture's end looks as well
def test_nothing_of_ray_is_left_when_its_process_ends() -> None:
    """Runs last: the fixture of this module has not ended yet, so a cluster of its own."""
    script = "from cloven.engine.ray import start_ray; import psutil; start_ray(); print(*[p.pid for p in psutil.Process().children(True)])"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0 and result.stdout.split(), result.stderr
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(int(pid)) for pid in result.stdout.split()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
