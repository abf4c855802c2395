"""Settings and fixtures for every test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, settings

settings.register_profile("cloven", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("cloven")


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
