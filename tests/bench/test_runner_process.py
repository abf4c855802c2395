from __future__ import annotations

import time

import pytest

from cloven.bench import runner_process
from cloven.bench.runner_process import RunnerProcess, median_of
from cloven.errors import RunError

ANSWER = 'import time; print(\'{"ready": true, "before": 5, "version": "3"}\', flush=True); time.sleep(%s)'


def sleeping(seconds: float) -> RunnerProcess:
    """A process that says that it is ready, and then sleeps: `timeit` runs what it is given."""
    return RunnerProcess("-n1", "-r1", ANSWER % seconds, module="timeit")


def test_what_a_process_says_of_itself() -> None:
    with sleeping(0) as runner:
        assert runner.ready == {"ready": True, "before": 5, "version": "3"} and runner.before == 5


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_process, "_PATIENCE", 0.2)
    runner = sleeping(120)
    started = time.monotonic()
    runner.stop()
    assert time.monotonic() - started < 60 and runner._process.returncode == -9


def test_a_process_that_fails_while_loading() -> None:
    with pytest.raises(RunError, match="ended with exit code 1"):
        RunnerProcess("-n1", "-r1", "raise SystemExit(1)", module="timeit")


def test_a_process_that_fails_when_it_is_asked() -> None:
    with sleeping(0.5) as runner, pytest.raises((RunError, ValueError)):
        runner.ask("decode")  # timeit prints a result, which is no answer, and ends
        runner.ask("decode")


@pytest.mark.parametrize(("kind", "passive"), [("split", True), ("stored", True), ("plain", False), ("keyed", False)])
def test_threads_sleep_in_the_trusted_process_alone(kind: str, passive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    seen = {}

    class Fake:
        stdin = stdout = None

        def __init__(self, _command: list[str], **options: object) -> None:
            seen.update(options["env"])  # type: ignore[call-overload]

    monkeypatch.setattr(runner_process.subprocess, "Popen", Fake)
    monkeypatch.setattr(RunnerProcess, "_answer", lambda self: {"before": 0})
    RunnerProcess(kind)
    assert (seen.get("OMP_WAIT_POLICY") == "PASSIVE") == passive


def test_the_median_is_over_all_values() -> None:
    assert median_of([{"seconds": [1, 2]}, {"seconds": [9]}]) == 2
    assert median_of([{"layers": [4]}, {"layers": [6]}], "layers") == 5
