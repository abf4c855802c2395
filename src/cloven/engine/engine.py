"""What an engine is, and the simplest one.

A task is a module-level function of one job; a job is a small frozen dataclass of paths and numbers. Jobs are idempotent: the same job
writes the same bytes, whichever engine runs it, so that an interrupted run is simply run again. Every job computes with one thread, or its
bits would depend on the machine's number of cores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from cloven.errors import BadInput

J = TypeVar("J")
ENGINES = ("auto", "inline", "pool", "ray")
SMALL = 2**27  # parameters up to which "auto" does not start processes: they take seconds to start


class Engine(Protocol):
    """Runs a task on many jobs."""

    def run(self, task: Callable[[J], None], jobs: Sequence[J]) -> Iterator[J]:
        """Run all; yields each job when it is done, in any order.

        Raises:
            ClovenError: the first error of a task; jobs that have not begun are dropped.
        """


class Inline:
    """One job after the other, in this process."""

    def run(self, task: Callable[[J], None], jobs: Sequence[J]) -> Iterator[J]:
        """See `Engine`."""
        for job in jobs:
            with one_thread():
                task(job)
            yield job


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums are then always taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def select_engine(name: str, parameters: int, bytes_per_job: int) -> Engine:
    """An engine by name.

    Args:
        name: "inline", "pool", "ray", or "auto": the pool for a model of more than 2^27 parameters, this process below.
        parameters: of the model.
        bytes_per_job: memory that a job may need; the pool starts no more processes than fit.

    Raises:
        BadInput: no such engine, or Ray is not installed or not reachable.
    """
    if name not in ENGINES:
        raise BadInput(f"engine {name!r}: choose one of {', '.join(ENGINES)}")
    if name == "ray":
        from cloven.engine.ray import RayEngine

        return RayEngine(bytes_per_job)
    if name == "pool" or (name == "auto" and parameters > SMALL):
        from cloven.engine.pool import ProcessPool

        return ProcessPool(bytes_per_job)
    return Inline()
