"""Threads that sleep while they wait: the trusted process and the worker take turns, and spinning threads would take the other's core."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Before PyTorch is imported: OpenMP threads sleep when idle, unless the environment says otherwise.

    Measured with both processes on the same two cores: spinning makes a split token up to seven times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
