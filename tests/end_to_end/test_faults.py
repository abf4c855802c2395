"""Real workers that are absent, die, sleep, lie or serve somebody else's bundle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq

import cloven
from cloven.cluster.worker_process import WorkerProcess
from cloven.errors import (
    ClovenError,
    ForeignBundle,
    RunError,
    SessionClosed,
    VerificationFailed,
    WorkerTimeout,
    WorkerUnreachable,
)
from tests.end_to_end.liar import Liar
from tests.end_to_end.serve_many import Workers
from tests.helpers import FakeWorker
from tests.split_models import (
    demo_bundle,
    demo_model,
    greedy,
    load,
    logits,
    open_session,
    random_ids,
    relative_error,
    run_python,
    tiny,
    tiny_bundle,
)

IDS = random_ids(97, 1, 5)
PROMPT = "ROMEO:"
BUSY = 6.0  # seconds that a busy machine may add


@pytest.fixture
def folder() -> Iterator[Path]:
    """Mode 0700 and a short path."""
    with tempfile.TemporaryDirectory(prefix="cl") as name:
        yield Path(name)


def within(seconds: float, act: Callable[[], object], kind: type[ClovenError], match: str) -> None:
    """The error comes, and in time: the timeout, and some seconds for a busy machine."""
    started = time.monotonic()
    with pytest.raises(kind, match=match):
        act()
    assert time.monotonic() - started < seconds + BUSY


def wait_until_under_way(session: cloven.Session, generation: threading.Thread) -> None:
    """Some tokens into a generation."""
    while session.telemetry.total().exchanges < 60:
        assert generation.is_alive(), "it ended early"
        time.sleep(0.01)


# --- absence


def test_no_worker(folder: Path) -> None:
    model = load(tiny_bundle("llama").trusted)
    within(1, lambda: cloven.attach(model, f"ipc://{folder}/w", timeout=1), WorkerUnreachable, "no worker at ipc:")


@pytest.mark.long
def test_a_worker_that_starts_a_little_later(folder: Path) -> None:
    """In the order in which people start things: the trusted side waits as long as its timeout allows."""
    bundle, address = tiny_bundle("llama"), f"ipc://{folder}/w"
    started: list[WorkerProcess] = []
    timer = threading.Timer(0.3, lambda: started.append(WorkerProcess(bundle.exposed, address)))
    timer.start()
    model = load(bundle.trusted)
    try:
        with open_session(model, address, timeout=30):
            assert relative_error(logits(model, IDS), logits(tiny("llama"), IDS)) < 0.1
    finally:
        timer.join()
        for worker in started:
            worker.stop()


# --- death and restart


def test_sigkill_in_the_middle_of_a_generation(folder: Path) -> None:
    """A clear error within the timeout; then a worker at the same address, and the same session writes what the unsplit model writes."""
    bundle, address = demo_bundle("int8x2"), f"ipc://{folder}/w"
    model = load(bundle.trusted)
    caught: list[BaseException] = []

    def generate() -> None:
        try:
            model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=400, min_new_tokens=400, do_sample=False)
        except BaseException as error:
            caught.append(error)

    with WorkerProcess(bundle.exposed, address) as first, open_session(model, address, timeout=15) as session:
        session.channel.timeout = 2.0
        thread = threading.Thread(target=generate)
        thread.start()
        wait_until_under_way(session, thread)
        first.kill()
        killed = time.monotonic()
        thread.join(20)
        assert time.monotonic() - killed < 2 + BUSY
        assert len(caught) == 1 and isinstance(caught[0], WorkerUnreachable), caught
        assert (address in str(caught[0]) and "model.layers" in str(caught[0])) or "lm_head" in str(caught[0])
        assert not session.closed
        session.channel.timeout = 20.0
        with WorkerProcess(bundle.exposed, address):
            assert greedy(model, PROMPT, 8) == greedy(demo_model(), PROMPT, 8)


@pytest.mark.long
def test_a_generation_goes_on_over_a_restart(folder: Path) -> None:
    """The worker is killed and replaced while a text is being written: the identical request is sent again, no pad is used twice, and
    the tokens are those of the unsplit model."""
    bundle, address = demo_bundle("int8x2"), f"ipc://{folder}/w"
    model = load(bundle.trusted)
    written: list[list[int]] = []
    with WorkerProcess(bundle.exposed, address) as first, open_session(model, address, timeout=40) as session:
        thread = threading.Thread(target=lambda: written.append(greedy(model, PROMPT, 40)))
        thread.start()
        wait_until_under_way(session, thread)
        first.kill()
        with WorkerProcess(bundle.exposed, address):
            thread.join(60)
        assert session.telemetry.total().resent >= 1
    assert written == [greedy(demo_model(), PROMPT, 40)]


def test_a_worker_that_sleeps(demo_worker: WorkerProcess) -> None:
    """SIGSTOP: a timeout that says so. After SIGCONT its late answers are dropped, and the texts are right."""
    model = load(demo_bundle("int8x2").trusted)
    with contextlib.ExitStack() as stack:
        stack.callback(demo_worker.process.send_signal, signal.SIGCONT)  # others use it, whatever happens here
        session = stack.enter_context(open_session(model, demo_worker.address, timeout=15))
        expected = greedy(demo_model(), PROMPT, 6)
        assert greedy(model, PROMPT, 6) == expected
        session.channel.timeout = 0.5
        demo_worker.process.send_signal(signal.SIGSTOP)
        for prompt in (PROMPT, "Another prompt"):
            within(0.5, lambda prompt=prompt: greedy(model, prompt, 6), WorkerTimeout, "no answer from the worker")  # type: ignore[misc]
        session.channel.timeout = 15.0
        demo_worker.process.send_signal(signal.SIGCONT)
        assert greedy(model, PROMPT, 6) == expected
        assert not session.closed


@pytest.mark.long
def test_a_nap_shorter_than_the_timeout_goes_unnoticed(folder: Path) -> None:
    bundle, address = tiny_bundle("llama"), f"ipc://{folder}/w"
    model = load(bundle.trusted)
    with WorkerProcess(bundle.exposed, address) as worker, open_session(model, address, timeout=15):
        expected = logits(model, IDS)
        worker.process.send_signal(signal.SIGSTOP)
        timer = threading.Timer(0.5, lambda: worker.process.send_signal(signal.SIGCONT))
        timer.start()
        assert relative_error(logits(model, IDS), expected) < 1e-5
        timer.join()


@pytest.mark.long  # in the short form test_worker_imports sends SIGINT, tests/cluster SIGTERM
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_ends_cleanly(number: int, folder: Path) -> None:
    bundle, address = tiny_bundle("llama"), f"ipc://{folder}/w"
    model = load(bundle.trusted)
    with WorkerProcess(bundle.exposed, address) as worker:
        with open_session(model, address):
            logits(model, IDS)
        worker.process.send_signal(number)
        assert worker.process.wait(10) == 0
        assert "Traceback" not in worker.log()
        assert not Path(f"{folder}/w").exists() or Path(f"{folder}/w").is_socket()


# --- lies


@pytest.mark.parametrize(
    ("lie_at", "layer"),
    [(1, r"model\.layers\.0\.self_attn\.\{q_proj,k_proj,v_proj\}"), (4, r"model\.layers\.0\.mlp\.down_proj"), (9, "lm_head")],
)
def test_a_lie_is_found_and_ends_the_session(lie_at: int, layer: str, folder: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    bundle, address = tiny_bundle("llama"), f"ipc://{folder}/w"
    model = load(bundle.trusted)
    with FakeWorker(context, address, Liar(bundle.exposed, lie_at)), open_session(model, address) as session:
        with pytest.raises(VerificationFailed, match=layer + ": the worker's answer is wrong in 1 of 5 rows"):
            logits(model, IDS)
        assert session.closed
        for _ in range(2):
            with pytest.raises(SessionClosed, match=layer):
                logits(model, IDS)
        # The operator may decide to connect again.
        with open_session(model, address):
            assert relative_error(logits(model, IDS), logits(tiny("llama"), IDS)) < 0.1


def test_a_worker_of_another_bundle(workers: Workers) -> None:
    mine, other = tiny_bundle("llama"), tiny_bundle("qwen2")
    with pytest.raises(ForeignBundle) as caught:
        cloven.attach(load(mine.trusted), workers.address(other), timeout=10)
    assert other.id in str(caught.value)


def test_nonsense_from_the_worker(folder: Path, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    bundle, address = tiny_bundle("llama"), f"ipc://{folder}/w"
    for answer in ([b""], [b"\xff" * 40], [b"x"] * 3):
        with FakeWorker(context, address, lambda _, answer=answer: [answer]), pytest.raises(RunError, match="malformed"):  # type: ignore[misc]
            cloven.attach(load(bundle.trusted), address, timeout=2)


# --- forks

FORKED = """
import os, sys, torch, cloven
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
session = cloven.attach(model, sys.argv[2], look_ahead=int(sys.argv[3]), timeout=20)
ids = torch.ones(1, 3, dtype=torch.long)
before = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
child = os.fork()
if not child:
    try:
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        code = 1
    except cloven.ClovenError as error:
        print(type(error).__name__, flush=True)
        code = 0
    os._exit(code)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
after = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
print(torch.equal(before, after))
session.close()
"""


@pytest.mark.parametrize("look_ahead", [pytest.param(0, marks=pytest.mark.long), 32])
def test_a_forked_child_uses_no_pad(look_ahead: int, tiny_worker: WorkerProcess) -> None:
    """The child has a copy of the key and the counter; its first pad would be the parent's next one."""
    result = run_python(FORKED, str(tiny_bundle("llama").trusted), tiny_worker.address, str(look_ahead))
    assert result.stdout.splitlines() == ["PadMisuse", "0", "True"], result.stderr


@pytest.mark.long
def test_an_interrupt_ends_the_command_line_without_a_traceback(demo_worker: WorkerProcess) -> None:
    command = [sys.executable, "-m", "cloven", "generate", str(demo_bundle("int8x2").trusted), "--worker", demo_worker.address]
    process = subprocess.Popen(
        [*command, "--prompt", PROMPT, "--max-new-tokens", "400"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    process.stdout.read(1)  # the first words are there
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors in ("", "cloven: interrupted\n")
