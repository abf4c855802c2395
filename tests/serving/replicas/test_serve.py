"""Replicas on a real local Ray, which all tests here share: it is slow to start."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cloven.cluster.worker_process import WorkerProcess
from cloven.engine.ray import start_ray
from cloven.errors import BadInput, RunError, StoreUnusable
from cloven.model.runtime import RuntimeOptions
from cloven.serving.half import open_half
from cloven.serving.loading import LoadOptions
from cloven.serving.options import ServeOptions
from cloven.serving.replicas import serve as serve_module
from cloven.serving.replicas import zone as zone_module
from cloven.serving.replicas.front import Front
from cloven.serving.replicas.serve import MOST, replicated
from cloven.serving.replicas.zone import zone
from cloven.slip.pads import fill, fill_job
from tests.served import run
from tests.serving.replicas.fakes import until
from tests.split_models import demo_bundle, demo_model, demo_tokenizer, greedy

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
PROMPT, TOKENS = "ROMEO:", 6


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """As `cloven serve` starts it, for two replicas."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves files open and warns of its own deprecations
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(zone_module, "start_ray", fresh_ray)
        with zone(2, insecure_ray_cluster=False) as module:
            yield module
        assert not module.is_initialized()
    forget_tokens()


def fresh_ray(processes: int | None) -> Any:
    forget_tokens()
    return start_ray(processes)


def forget_tokens() -> None:
    """Ray reads its settings once in a process: other tests of this one start Rays that ask for no token."""
    if "ray" in sys.modules:
        test_utils: Any = importlib.import_module("ray._private.authentication_test_utils")
        test_utils.reset_auth_token_state()


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess(demo_bundle("int8x2").exposed) as process:
        yield process


@pytest.fixture
def shared(ray: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tests' Ray in the place of one that every call would start."""
    monkeypatch.setattr(serve_module, "zone", lambda _replicas, _insecure: contextlib.nullcontext(ray))
    return ray


def by_value(source: str) -> Callable[[], None]:
    """A function that Ray sends with its code: no test can be imported there."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    made: Callable[[], None] = names["harden"]
    return made


def noting(folder: Path) -> Callable[[], None]:
    """Every pad that a store hands out in a replica is noted in a file of its process."""
    return by_value(
        f"""
def harden():
    import json, os
    from pathlib import Path
    from cloven.masks.pad_store import PadStore
    os.environ["CLOVEN_STATE"] = {os.environ["CLOVEN_STATE"]!r}  # of this test: Ray is started once for several
    pieces = PadStore._pieces
    def noted(self, group, rows):
        given = pieces(self, group, rows)
        with (Path({str(folder)!r}) / str(os.getpid())).open("a") as file:
            file.writelines(json.dumps([group, first, count]) + "\\n" for first, count in given)
        return given
    PadStore._pieces = noted
"""
    )


@contextlib.contextmanager
def served(worker: WorkerProcess, replicas: int = 2, harden: Callable[[], None] | None = None, **runtime: Any) -> Iterator[Front]:
    half = open_half(demo_bundle("int8x2").trusted, worker.address, None, None)
    options = RuntimeOptions(worker.address, **runtime)
    nothing = by_value("def harden(): pass")
    with replicated(half, LoadOptions("bard", dtype="float32"), options, ServeOptions(max_running=4), replicas, harden or nothing) as (
        name,
        made,
    ):
        assert name == "bard"
        yield made


@contextlib.asynccontextmanager
async def client_of(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    app: Any = front.application(None)
    async with (
        front._life(None),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=60) as client,
    ):
        await until(lambda: len(front.fleet.live) == front.fleet.wanted)
        yield client


async def written(client: httpx.AsyncClient, **more: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **more}
    return await client.post("/v1/completions", json=body)


def expected() -> str:
    return str(demo_tokenizer().decode(greedy(demo_model(), PROMPT, TOKENS, pad_token_id=0), skip_special_tokens=True))


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def pids(ray: Any, front: Front) -> list[int]:
    """Of the replicas that live, in order."""
    ask = eval("lambda self: __import__('os').getpid()", {"__name__": "__main__"})
    return [ray.get(replica.started.handle.__ray_call__.remote(ask), timeout=30) for replica in front.fleet.live]


def test_two_replicas_and_one_store(shared: Any, worker: WorkerProcess, tmp_path: Path) -> None:
    """No pad is used by two, also where one is killed and another takes its place; texts are those of the unsplit model; a session stays at
    its replica; and none of what was asked or of the keys passed through Ray. All at once: each replica takes seconds to start."""
    from ray import cloudpickle

    bundle, store, notes = demo_bundle("int8x2"), tmp_path / "pads", tmp_path / "notes"
    notes.mkdir()
    fill(fill_job(bundle.trusted, 800, store))
    sent, given = [], cloudpickle.dumps

    def dumps(value: Any, *more: Any, **options: Any) -> bytes:
        data: bytes = given(value, *more, **options)
        sent.append(data)
        return data

    async def test() -> None:
        with served(worker, harden=noting(notes), pads=store) as front:
            async with client_of(front) as client:
                first, second = pids(shared, front)
                assert first != second and [psutil.Process(pid).nice() for pid in (first, second)] == 2 * [psutil.Process().nice()]
                answers = await asyncio.gather(*(written(client) for _ in range(8)))
                assert {text_of(answer) for answer in answers} == {expected()}
                assert {int(path.name) for path in notes.iterdir()} == {first, second}

                before = {path.name: path.stat().st_size for path in notes.iterdir()}
                for _ in range(3):
                    assert text_of(await written(client, user="me")) == expected()
                grown = [path.name for path in notes.iterdir() if path.stat().st_size > before[path.name]]
                assert len(grown) == 1  # one replica has computed all three
                streamed = await written(client, stream=True, user="me")
                events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
                assert events[-1] == "[DONE]"
                assert "".join(json.loads(one)["choices"][0]["text"] for one in events[:-1]) == expected()

                own = int(grown[0])
                long = asyncio.create_task(written(client, max_tokens=400, user="me"))
                await until(lambda: any(replica.busy for replica in front.fleet.live))
                await asyncio.sleep(0.3)
                os.kill(own, signal.SIGKILL)
                lost = await long
                assert lost.status_code == 503 and lost.headers["retry-after"] == "1" and lost.json()["error"]["code"] == "replica_lost"
                assert text_of(await written(client, user="me")) == expected()  # elsewhere
                await until(lambda: len(front.fleet.live) == 2, 120)
                third = next(pid for pid in pids(shared, front) if pid not in (first, second))
                answers = await asyncio.gather(*(written(client) for _ in range(8)))
                assert {text_of(answer) for answer in answers} == {expected()}
                assert (notes / str(third)).stat().st_size > 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloudpickle, "dumps", dumps)
        run(test, 300)
    used: set[tuple[int, int]] = set()
    for path in notes.iterdir():
        pieces = [json.loads(line) for line in path.read_text().splitlines()]
        pads = [(group, first + number) for group, first, count in pieces for number in range(count)]
        assert len(pads) > 100 and not used & set(pads), "a pad was used twice"
        used |= set(pads)
        assert len(set(pads)) == len(pads)
    assert len(list(notes.iterdir())) == 3
    key = (store / "key").read_bytes()
    assert sent and not any(key in data or PROMPT.encode() in data for data in sent)


@pytest.mark.long
def test_without_a_store_each_has_a_key_of_its_own(shared: Any, worker: WorkerProcess) -> None:
    """Its first pads differ from the other's: the keys are drawn in each process."""
    noted = by_value(
        """
def harden():
    import hashlib, os
    from cloven.masks.one_time import PadKey
    made = PadKey.__init__
    def noting(self):
        made(self)
        os.environ["DRAWN"] = os.environ.get("DRAWN", "") + hashlib.sha256(self._key).hexdigest() + " "
    PadKey.__init__ = noting
"""
    )

    async def test() -> None:
        with served(worker, harden=noted) as front:
            async with client_of(front) as client:
                assert text_of(await written(client)) == expected()
                ask = eval("lambda self: __import__('os').environ.get('DRAWN', '').split()", {"__name__": "__main__"})
                drawn = [shared.get(one.started.handle.__ray_call__.remote(ask), timeout=30) for one in front.fleet.live]
                assert all(drawn) and not set(drawn[0]) & set(drawn[1])
                kept = [replica.started.handle for replica in front.fleet.live]
            with pytest.raises(shared.exceptions.RayActorError):  # ended, with the application
                shared.get(kept[0].wait.remote(), timeout=30)

    run(test, 120)


def test_what_cannot_start_says_why(shared: Any, worker: WorkerProcess, tmp_path: Path) -> None:
    """The error of `cloven serve`, of its kind, and nothing is left."""
    for number in (0, MOST + 1):
        with pytest.raises(BadInput, match=f"replicas {number}: give 1 to {MOST}"), served(worker, number):
            pass
    with pytest.raises(StoreUnusable), served(worker, pads=tmp_path / "nowhere"):
        pass
    broken = by_value("def harden(): raise ZeroDivisionError('with a secret')")
    with pytest.raises(RunError, match=r"^a replica could not be started: ZeroDivisionError$"), served(worker, 1, broken):
        pass


def test_the_zone_is_closed(ray: Any) -> None:
    """Another process of this machine gets in with the token, and not without."""
    node = ray._private.worker.global_worker.node
    program = f"""
from ray._raylet import GcsClient
print(len(GcsClient(address={node.gcs_address!r}).internal_kv_keys(b"", namespace=None, timeout=10)))
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": os.environ["RAY_AUTH_TOKEN_PATH"]}
    for more, inside in (
        (token, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        (token | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}, False),
    ):
        done = subprocess.run([sys.executable, "-c", program], env=inherited | more, capture_output=True, text=True, timeout=60)
        assert (done.returncode == 0 and int(done.stdout) > 0) is inside, (more.keys(), done.stderr[-300:])
    addresses = {
        one.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for one in process.net_connections("inet")
        if one.status == "LISTEN"
    }
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, addresses
    assert Path(node._session_dir).is_relative_to(os.environ["RAY_TMPDIR"])
