"""`cloven serve --engine ray` as a user runs it: real processes, a Ray of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import zmq

from cloven.cluster.enclave_process import EnclaveProcess
from cloven.cluster.worker_process import WorkerProcess
from tests.end_to_end.commands import Command, one_line
from tests.end_to_end.endpoint import PROMPTS, EndpointProcess, endpoint, kv_demo, streamed, written
from tests.end_to_end.liar import Liar
from tests.helpers import FakeWorker
from tests.split_models import demo_bundle, demo_model, demo_tokenizer, greedy

KEY = "k" * 32
TOKENS = 8
RAY = ("--engine", "ray", "--replicas", "2")


@pytest.fixture(autouse=True)
def own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def expected(prompt: str) -> str:
    return str(demo_tokenizer().decode(greedy(demo_model(), prompt, TOKENS, pad_token_id=0), skip_special_tokens=True))


def descendants(process: EndpointProcess) -> list[psutil.Process]:
    return psutil.Process(process.process.pid).children(recursive=True)


def replicas(process: EndpointProcess) -> list[psutil.Process]:
    return [one for one in descendants(process) if one.name().startswith("ray::Replica")]


def all_ended(processes: list[psutil.Process], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def wait_for_live(process: EndpointProcess, wanted: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while (live := httpx.get(f"{process.root}/health", timeout=10).json()["live"]) != wanted:
        assert time.monotonic() < deadline, f"{live} of {wanted}: {process.log()}"
        time.sleep(0.1)


def test_the_command(demo_worker: WorkerProcess, tmp_path: Path) -> None:
    """Keys are asked for; many ask two replicas; one is killed in mid-stream, and replaced; SIGTERM leaves nothing."""
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    arguments = ("--worker", demo_worker.address, "--dtype", "float32", "--api-key-file", str(keys), *RAY)
    with EndpointProcess(demo_bundle("int8x2").trusted, *arguments) as process, process.client(KEY) as client:
        name = process.ready["model"]
        started, computing = descendants(process), replicas(process)
        assert process.ready["scheme"] == "slip" and len(computing) == 2
        with process.client("x" * 32) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert all(one.uids().real == os.getuid() for one in computing)

        def ask(number: int) -> str:
            prompt = PROMPTS[number % len(PROMPTS)]
            answer = client.completions.create(model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, user=str(number))
            assert answer.choices[0].text == expected(prompt)
            return prompt

        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(ask, range(16)))) == 16

        pieces: list[str] = []
        with (
            pytest.raises(openai.APIError) as caught,
            client.completions.create(
                model=name, prompt="ROMEO:", max_tokens=500, temperature=0, stream=True, user="me", stop=["\x00"]
            ) as stream,
        ):
            for piece in stream:
                if not pieces:
                    for one in computing:  # whichever it is
                        one.kill()
                pieces.append(piece.choices[0].text)
        assert "the replica that had this request has ended" in str(caught.value) and pieces
        wait_for_live(process, 2)
        started += descendants(process)
        assert ask(0) and {one.pid for one in replicas(process)}.isdisjoint({one.pid for one in computing})
        assert process.stop() == 0
        assert all_ended(started), [one for one in started if one.is_running()]
        log = process.log()
        assert "replica 1 has ended" in log and "serves in its place" in log and "Traceback" not in log
        assert KEY not in log and "ROMEO" not in log


def test_what_does_not_go_together(cloven_here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted = str(demo_bundle("int8x2").trusted)
    given = ("serve", trusted, "--worker", f"ipc://{tmp_path}/w", "--port", "0")
    one_line(cloven_here(*given, "--replicas", "2"), 2, "--replicas and --insecure-ray-cluster belong to --engine ray")
    one_line(cloven_here(*given, "--insecure-ray-cluster"), 2, "belong to --engine ray")
    one_line(cloven_here(*given, "--engine", "cuda"), 2, "engine 'cuda': choose process or ray")
    one_line(cloven_here(*given, "--engine", "ray", "--replicas", "65"), 2, "replicas 65: give 1 to 64")
    one_line(cloven_here(*given[:-1], "9400", "--metrics-port", "9400"), 2, "--port and --metrics-port are both 9400")
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    one_line(cloven_here(*given, "--engine", "ray"), 3, "RAY_ADDRESS names a Ray cluster")


@pytest.mark.long
def test_nobody_to_connect_to(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="no address: cloven: hello: no worker at ipc:"),
        EndpointProcess(demo_bundle("int8x2").trusted, "--worker", f"ipc://{tmp_path}/w", "--timeout", "1", *RAY),
    ):
        pass


@pytest.mark.long
def test_a_front_that_is_killed_takes_all_with_it(demo_worker: WorkerProcess) -> None:
    with endpoint(demo_bundle("int8x2").trusted, "--worker", demo_worker.address, *RAY) as (process, client):
        assert written(client, "ROMEO:", 2)
        started, computing = descendants(process), replicas(process)
        folders = {match[0] for one in started for word in one.cmdline() if (match := re.search(r"/tmp/cl-[^/]+", word))}
        assert len(computing) == 2 and len(folders) == 1
        process.stop(signal.SIGKILL)
        assert all_ended(computing, 30), [one for one in computing if one.is_running()]
        assert all_ended(started, 180), [one for one in started if one.is_running()]  # Ray's own agents look once a minute or so
        shutil.rmtree(folders.pop())  # which only the one that was killed could have removed


@pytest.mark.long
def test_a_lying_worker_gets_one_try(context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
    """Not one for each replica, and none for a replica that is started anew."""
    bundle, address = demo_bundle("int8"), f"ipc://{folder}/w"
    liar = Liar(bundle.exposed, lie_at=150)
    with FakeWorker(context, address, liar), endpoint(bundle.trusted, "--worker", address, *RAY) as (process, client):
        with pytest.raises(openai.InternalServerError) as caught:
            written(client, "ROMEO:", 200)
        assert caught.value.status_code == 502 and caught.value.code == "verification_failed"
        asked = liar.products
        for number in range(4):
            with pytest.raises(openai.InternalServerError) as caught:
                written(client, "ROMEO:", 2, user=str(number))
            assert caught.value.status_code == 503 and caught.value.code == "session_ended"
        for one in replicas(process):
            one.kill()
        time.sleep(5)
        assert process.health() == "ended" and replicas(process) == [] and liar.products == asked
        log = process.log()
        assert "no replica serves any longer" in log and "the worker's answer is wrong" in log


@pytest.mark.long
def test_kv_shield_session_mode_computes_two_at_once(folder: Path) -> None:
    """Where one process computes one request after the other, replicas compute several; texts are those of one process."""
    out, address = kv_demo("session"), f"ipc://{folder}/e"
    with (
        EnclaveProcess(out / "trusted", address),
        endpoint(out / "exposed", "--enclave", address, "--dtype", "float32", *RAY) as (_, client),
    ):
        with ThreadPoolExecutor(4) as pool:
            texts: Any = list(pool.map(lambda prompt: streamed(client, prompt, TOKENS), PROMPTS[:4]))
        assert texts == [expected(prompt) for prompt in PROMPTS[:4]]
