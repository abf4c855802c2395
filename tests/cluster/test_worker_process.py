from __future__ import annotations

import os
import signal
import stat
import time
from pathlib import Path

import pytest

from cloven.cluster import server_process
from cloven.cluster.worker_process import WorkerProcess
from cloven.errors import RunError
from tests.helpers import free_port
from tests.split_models import load, logits, open_session, random_ids, tiny_bundle


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_serves_and_leaves_nothing_behind() -> None:
    bundle = tiny_bundle("llama")
    with WorkerProcess(bundle.exposed) as worker:
        folder = Path(worker.address.removeprefix("ipc://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and worker.pid != os.getpid()
        model = load(bundle.trusted)
        with open_session(model, worker.address):
            logits(model, random_ids(97, 1, 3))
        worker.require_running()
        assert worker.log() == ""
    assert worker.process.returncode == 0 and gone(worker.pid) and not folder.exists()
    worker.stop()  # twice is harmless


def test_it_waits_for_the_metrics_too(monkeypatch: pytest.MonkeyPatch) -> None:
    port, asked = free_port(), []

    def late(*address: object) -> bool:
        asked.append(address)
        return len(asked) == 3

    monkeypatch.setattr(server_process, "_open", late)
    with WorkerProcess(tiny_bundle("llama").exposed, None, "--metrics-port", str(port)):
        assert asked == [("127.0.0.1", port)] * 3


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"worker process ended with exit code 2: cloven: .*nowhere is no bundle half"), worker:
        pass
    assert gone(worker.pid)


@pytest.mark.long
def test_kill_and_a_second_start_at_the_same_address(socket_folder: Path) -> None:
    bundle, address = tiny_bundle("llama"), f"ipc://{socket_folder}/w"
    model = load(bundle.trusted)
    with WorkerProcess(bundle.exposed, address, "--threads", "1") as first:
        with open_session(model, address):
            first.kill()
        assert first.process.returncode == -signal.SIGKILL
        with WorkerProcess(bundle.exposed, address) as second, open_session(model, address):
            logits(model, random_ids(97, 1, 3))
            assert second.pid != first.pid


def test_a_stopped_process_is_killed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_STOP_SECONDS", 0.2)
    with WorkerProcess(tiny_bundle("llama").exposed) as worker:
        worker.process.send_signal(signal.SIGSTOP)  # SIGTERM waits until it goes on
        started = time.monotonic()
    assert gone(worker.pid) and time.monotonic() - started < 5
