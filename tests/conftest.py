"""Settings and fixtures for every test."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, settings

settings.register_profile("cloven", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("cloven")
_numbers = itertools.count()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was skipped is counted and said, with the reason: a tool that is missing here must not be missed."""
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    reasons = Counter(str(where[2]).removeprefix("Skipped: ") for where in skipped if isinstance(where, tuple))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped: {count} x {reason}")


@pytest.fixture(autouse=True, scope="session")
def away_from_home() -> Iterator[Path]:
    """Nothing reaches the home folder of the person who runs the tests: one cache for the run, and a state folder."""
    with tempfile.TemporaryDirectory(prefix="cloven-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOVEN_CACHE", f"{folder}/cache")
        patch.setenv("CLOVEN_STATE", f"{folder}/state")  # for fixtures of a module or of the session
        yield Path(folder)


@pytest.fixture(autouse=True)
def own_state(away_from_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a state folder of its own: witnesses of ledgers are forgotten with it."""
    state = away_from_home / f"state-{next(_numbers)}"
    monkeypatch.setenv("CLOVEN_STATE", str(state))
    return state


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """A context that inproc peers share; destroyed with all its sockets."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder of mode 0700 with a short path: a Unix socket's path may have 107 bytes, and pytest's own folders can be longer."""
    with tempfile.TemporaryDirectory(prefix="c-") as folder:
        yield Path(folder)
