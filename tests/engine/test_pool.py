"""The pool of processes: fresh processes of one thread, that end with their parent, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cloven.engine import pool
from cloven.engine.engine import Inline
from cloven.engine.pool import ProcessPool
from cloven.errors import BadInput, RunError
from tests.engine.tasks import (
    Job,
    break_at_two,
    compute,
    die_at_two,
    fail_at_two,
    fail_while_others_last_long,
    jobs,
    note,
    noted,
)


def children() -> set[int]:
    """Processes of pools: multiprocessing's resource tracker lives as long as this process."""
    found = psutil.Process().children(recursive=True)
    return {child.pid for child in found if "spawn_main" in " ".join(child.cmdline())}


@pytest.fixture(autouse=True)
def nobody_is_left() -> object:
    before = children()
    yield
    assert children() <= before


def test_jobs_run_in_fresh_processes_of_one_thread(tmp_path: Path) -> None:
    given = jobs(tmp_path, 6)
    done = list(ProcessPool(1, processes=2).run(note, given))
    assert sorted(done, key=lambda job: job.number) == given
    notes = noted(given)
    assert {entry["threads"] for entry in notes} == {1}
    assert os.getpid() not in {entry["process"] for entry in notes} and len({entry["process"] for entry in notes}) <= 2


def test_the_bits_are_those_of_this_process(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = jobs(tmp_path / "here", 3), jobs(tmp_path / "there", 3)
    list(Inline().run(compute, here))
    list(ProcessPool(1, processes=2).run(compute, there))
    assert [job.path.read_text() for job in here] == [job.path.read_text() for job in there]


def test_the_first_error_ends_it(tmp_path: Path) -> None:
    given = jobs(tmp_path, 40)
    with pytest.raises(BadInput, match="number two is bad"):
        list(ProcessPool(1, processes=1).run(fail_at_two, given))
    assert not given[2].path.exists() and not given[-1].path.exists()  # those that had not begun were dropped


def test_an_error_does_not_wait_for_jobs_that_last_long(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(BadInput, match="number zero is bad"):
        list(ProcessPool(1, processes=2).run(fail_while_others_last_long, jobs(tmp_path, 2)))
    assert time.monotonic() - started < 60


def test_a_bug_is_not_taken_for_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        list(ProcessPool(1, processes=1).run(break_at_two, jobs(tmp_path, 4)))


def test_a_process_that_dies(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a job's process ended suddenly: out of memory\?"):
        list(ProcessPool(1, processes=1).run(die_at_two, jobs(tmp_path, 6)))


def test_whoever_asks_may_stop(tmp_path: Path) -> None:
    given = jobs(tmp_path, 20)
    for job in ProcessPool(1, processes=1).run(note, given):
        assert job.path.exists()
        break
    assert not given[-1].path.exists()


def test_no_more_processes_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_cores", lambda: 8)
    monkeypatch.setattr(pool, "available_bytes", lambda: 10 * 2**30)
    assert [ProcessPool(size).processes for size in (0, 2**30, 3 * 2**30, 100 * 2**30)] == [8, 8, 3, 1]
    assert ProcessPool(2**30, processes=5).processes == 5


# --- the parent is killed or interrupted: as in real life, with a parent of its own

PARENT = """
import sys
from pathlib import Path
from cloven.engine.pool import ProcessPool
from tests.engine.tasks import last_long, jobs

if __name__ == "__main__":
    list(ProcessPool(1, processes=2).run(last_long, jobs(Path(sys.argv[1]), 4)))
"""


def started(tmp_path: Path) -> subprocess.Popen[str]:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(parent: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(parent).children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_processes_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with started(tmp_path) as parent:
        wait_for(lambda: Job(str(tmp_path), 0).path.exists() and Job(str(tmp_path), 1).path.exists())
        there = processes_of(parent.pid)
        assert len(there) == 2
        parent.kill()
        wait_for(lambda: gone(there), 20)


@pytest.mark.parametrize("delay", [0.0, pytest.param(0.5, marks=pytest.mark.long)])
def test_processes_that_have_only_just_begun_die_as_well(tmp_path: Path, delay: float) -> None:
    """They import for seconds before they can ask the kernel to be killed with their parent."""
    with started(tmp_path) as parent:
        wait_for(lambda: len(processes_of(parent.pid)) == 2)
        there = processes_of(parent.pid)
        time.sleep(delay)
        parent.kill()
        wait_for(lambda: gone(there), 60)


def test_an_interruption_from_the_terminal_is_quick_and_quiet(tmp_path: Path) -> None:
    """Ctrl-C goes to every process of the group; only the parent takes notice, and ends the others."""
    with started(tmp_path) as parent:
        wait_for(lambda: Job(str(tmp_path), 0).path.exists() and Job(str(tmp_path), 1).path.exists())
        there = processes_of(parent.pid)
        os.killpg(parent.pid, signal.SIGINT)
        _, errors = parent.communicate(timeout=60)
        assert gone(there)
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt") and "SpawnProcess" not in errors
