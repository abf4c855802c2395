"""Real processes for the whole folder: each kind of worker is started once."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloven.cli import hardening
from cloven.cli.main import run
from cloven.cluster.worker_process import WorkerProcess
from tests.end_to_end.commands import Command, Outcome
from tests.end_to_end.serve_many import Workers
from tests.split_models import demo_bundle, tiny_bundle

# The workers started here inherit it; for this process itself tests/__init__.py has set it before PyTorch was imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """One process that serves as many tiny bundles as are asked for."""
    with Workers() as workers:
        yield workers


@pytest.fixture(scope="session")
def demo_worker() -> Iterator[WorkerProcess]:
    """`cloven worker` with the demo model, int8x2."""
    with WorkerProcess(demo_bundle("int8x2").exposed) as worker:
        yield worker


@pytest.fixture(scope="session")
def tiny_worker() -> Iterator[WorkerProcess]:
    """`cloven worker` with the tiny Llama, int8."""
    with WorkerProcess(tiny_bundle("llama").exposed) as worker:
        yield worker


@pytest.fixture
def cloven_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`cloven ARGUMENTS` in this process, which keeps its core dumps and its log."""
    monkeypatch.setattr(hardening, "forbid_core_dumps", lambda: None)
    logger = logging.getLogger("cloven")
    handlers, level = list(logger.handlers), logger.level

    def command(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cloven", *arguments])
        capsys.readouterr()
        code = 0
        try:
            run()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield command
    logger.handlers = handlers
    logger.setLevel(level)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Mode 0700 and a short path."""
    with tempfile.TemporaryDirectory(prefix="cl") as name:
        yield Path(name)
