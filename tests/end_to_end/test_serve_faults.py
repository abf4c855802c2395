"""The other half of what is served is killed, lies, or comes back: every request ends, none of them wrongly, and service goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import zmq

from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.cluster.enclave_process import EnclaveProcess
from cloven.cluster.server_process import ServerProcess
from cloven.cluster.worker_process import WorkerProcess
from cloven.zoo.demo import demo_model_path
from tests.end_to_end.endpoint import PROMPTS, EndpointProcess, endpoint, kv_demo, lora_demo, written
from tests.end_to_end.liar import Liar
from tests.helpers import FakeWorker
from tests.lora_bundles import copied
from tests.split_models import demo_bundle

TOKENS = 6
TIMEOUT = 2.0
RESUMES = 5.0
Start = Callable[[str], ServerProcess]
Case = tuple[Path, str, Start, tuple[str, ...]]


def slip(_folder: Path) -> Case:
    bundle = demo_bundle("int8x2")
    return bundle.trusted, "--worker", lambda address: WorkerProcess(bundle.exposed, address), ()


def kv(mode: str) -> Case:
    return kv_demo(mode) / "exposed", "--enclave", lambda address: EnclaveProcess(kv_demo(mode) / "trusted", address), ()


def permute(_folder: Path) -> Case:
    return kv("permute")


def session(_folder: Path) -> Case:
    return kv("session")


def lora(folder: Path) -> Case:
    out = copied(lora_demo(), folder / "lora")
    return out / "client", "--server", lambda address: AdapterServerProcess(out / "server", address), ("--base", str(demo_model_path()))


CASES = [slip, *(pytest.param(case, marks=pytest.mark.long) for case in (permute, session, lora))]


@contextmanager
def running(case: Case, address: str, *arguments: str) -> Iterator[tuple[EndpointProcess, openai.OpenAI, ServerProcess]]:
    half, option, start, more = case
    peer = start(address)
    with peer, endpoint(half, option, address, *more, "--dtype", "float32", "--timeout", str(TIMEOUT), *arguments) as (process, client):
        yield process, client, peer


@pytest.mark.parametrize("make", CASES)
def test_killed_and_started_again_during_a_hundred_requests(make: Callable[[Path], Case], tmp_path: Path, folder: Path) -> None:
    """Eight clients; a SIGKILL in the middle, the same server again a little later."""
    case, address = make(tmp_path), f"ipc://{folder}/peer"
    with running(case, address) as (process, client, peer):
        right = {prompt: written(client, prompt, TOKENS) for prompt in PROMPTS}
        assert len(set(right.values())) > 4
        outcomes: list[tuple[str, object, float]] = []
        enough = threading.Event()

        def ask(number: int) -> None:
            prompt, started = PROMPTS[number % len(PROMPTS)], time.monotonic()
            try:
                got: object = written(client, prompt, TOKENS)
            except openai.APIStatusError as error:
                got = error
                time.sleep(0.1)  # or all hundred are refused while nobody is there
            outcomes.append((prompt, got, time.monotonic() - started))
            if len(outcomes) == 25:
                enough.set()

        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(ask, number) for number in range(100)]
            assert enough.wait(120)
            peer.kill()
            Path(f"{folder}/peer").unlink()  # so that the next one is there when its socket is
            time.sleep(TIMEOUT + 0.5)  # longer than the answer in the making is waited for
            with case[2](address):
                assert process.wait_for("ok", RESUMES) < RESUMES
                for job in jobs:
                    job.result(120)
                assert {prompt: written(client, prompt, TOKENS) for prompt in PROMPTS} == right
        assert len(outcomes) == 100
        failed = [got for _, got, _ in outcomes if isinstance(got, openai.APIStatusError)]
        assert failed, "nobody noticed that it was killed"
        for error in failed:
            assert error.status_code in (502, 503) and error.code in ("peer_away", "peer_failed"), error
            assert address not in error.message
        assert all(got == right[prompt] for prompt, got, _ in outcomes if isinstance(got, str))
        assert sum(isinstance(got, str) for _, got, _ in outcomes) >= 25
        assert max(seconds for *_, seconds in outcomes) < 60
        assert "requests are refused until the other half answers again" in process.log() and "Traceback" not in process.log()


def test_a_stream_that_breaks_says_so(folder: Path) -> None:
    """The pieces so far are right; then an error, and no `[DONE]`."""
    case, address = slip(folder), f"ipc://{folder}/peer"
    with running(case, address) as (process, client, peer):
        right = written(client, "ROMEO:", 200)
        pieces: list[str] = []
        name: Any = client.models.list().data[0].id
        stream = client.completions.create(model=name, prompt="ROMEO:", max_tokens=200, temperature=0, stream=True)

        def read() -> None:
            for piece in stream:
                pieces.append(piece.choices[0].text)
                if len(pieces) == 5:
                    peer.kill()

        with pytest.raises(openai.APIError, match="does not answer at the moment"):
            read()
        assert right.startswith("".join(pieces)) and 5 <= len(pieces) < 200
        with pytest.raises(openai.InternalServerError) as caught:
            written(client, "ROMEO:", 1)
        assert caught.value.status_code == 503 and caught.value.code == "peer_away"
        assert process.health() == "away"
        assert httpx.get(f"{process.root}/health").status_code == 503


@pytest.mark.parametrize("running_at_once", [pytest.param("1", marks=pytest.mark.long), "16"])
def test_a_lie_ends_service_until_the_operator_comes(running_at_once: str, folder: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """502 for the request that met the lie, 503 for all others; nobody asks the liar again, though from then on it would tell the truth."""
    bundle, address = demo_bundle("int8"), f"ipc://{folder}/w"
    liar = Liar(bundle.exposed, lie_at=150)
    with (
        FakeWorker(context, address, liar),
        endpoint(bundle.trusted, "--worker", address, "--max-running", running_at_once) as (process, client),
    ):
        assert written(client, "ROMEO:", 2)
        with pytest.raises(openai.InternalServerError) as caught:
            written(client, "ROMEO:", 50)
        assert caught.value.status_code == 502 and caught.value.code == "verification_failed"
        asked = liar.products
        for _ in range(3):
            with pytest.raises(openai.InternalServerError) as caught:
                written(client, "ROMEO:", 2)
            assert caught.value.status_code == 503 and caught.value.code == "session_ended"
        time.sleep(1.5)  # longer than it takes to look for one that was away
        assert process.health() == "ended" and liar.products == asked == 150
        assert "nothing is served any longer" in process.log() and "the worker's answer is wrong" in process.log()
        assert process.stop() == 0


def grown(process: EndpointProcess, client: openai.OpenAI, warm: float, seconds: float) -> float:
    """MB per minute by which the endpoint grows under load, after it has warmed up."""
    memory, until = psutil.Process(process.process.pid), time.monotonic() + warm + seconds
    right = {prompt: written(client, prompt, TOKENS) for prompt in PROMPTS}
    samples: list[tuple[float, float]] = []

    def load(number: int) -> None:
        while time.monotonic() < until:
            prompt = PROMPTS[number % len(PROMPTS)]
            assert written(client, prompt, TOKENS) == right[prompt]
            number += 1

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(load, number) for number in range(4)]
        time.sleep(warm)
        while time.monotonic() < until:
            samples.append((time.monotonic(), memory.memory_info().rss / 2**20))
            time.sleep(0.2)
        for job in jobs:
            job.result(60)
    half = len(samples) // 2  # the lowest of each half: garbage comes and goes
    early, late = min(samples[:half], key=lambda pair: pair[1]), min(samples[half:], key=lambda pair: pair[1])
    return 60 * (late[1] - early[1]) / max(1.0, seconds / 2)


@pytest.mark.parametrize(("warm", "seconds", "most"), [(20, 40, 12.0), pytest.param(60, 600, 1.0, marks=pytest.mark.long)])
def test_a_soak(warm: float, seconds: float, most: float, folder: Path) -> None:
    """Ten minutes under load grow by less than 1 MB per minute (the short form, a minute, cannot tell less than some 50 kB
    per request from noise)."""
    with running(slip(folder), f"ipc://{folder}/peer") as (process, client, _):
        assert grown(process, client, warm, seconds) < most
        assert process.health() == "ok"
