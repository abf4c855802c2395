"""Real processes for the whole folder: each kind of worker is started once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cloven.cluster.worker_process import WorkerProcess
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
