"""A pool of processes on this machine."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from cloven.engine.memory import available_bytes
from cloven.errors import RunError

J = TypeVar("J")
_PR_SET_PDEATHSIG = 1


class ProcessPool:
    """As many fresh processes as there are cores and as fit in the free memory, one thread each.

    Args:
        bytes_per_job: memory that a job may need.
        processes: how many; None: as above.
    """

    def __init__(self, bytes_per_job: int, processes: int | None = None) -> None:
        self.processes = processes or max(1, min(_cores(), available_bytes() // max(1, bytes_per_job)))

    def run(self, task: Callable[[J], None], jobs: Sequence[J]) -> Iterator[J]:
        """See `Engine`."""
        spawn = multiprocessing.get_context("spawn")  # a fork would carry locks and secrets of this process along
        executor = ProcessPoolExecutor(self.processes, mp_context=spawn, initializer=_one_thread_and_no_orphans, initargs=(os.getpid(),))
        try:
            # Not all at once: when a job fails, those that have not begun are dropped.
            waiting = list(reversed(jobs))
            running: dict[Future[None], J] = {}
            while waiting or running:
                while waiting and len(running) < 2 * self.processes:
                    job = waiting.pop()
                    running[_submit(executor, task, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    future.result()
                    yield job
        except BrokenProcessPool as error:
            raise RunError(
                "a job's process ended suddenly: out of memory? Or, in a script of your own: it needs "
                "`if __name__ == '__main__':` around what it does, or engine='inline'"
            ) from error
        except BaseException:
            _kill(executor)  # a running job may take minutes, and loses nothing that it has not to do again
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, task: Callable[[J], None], job: J) -> Future[None]:
    """This may start a process, which inherits the mask: an interruption from the terminal is this process's business alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(task, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(executor: ProcessPoolExecutor) -> None:
    for process in list((executor._processes or {}).values()):
        process.kill()


def _one_thread_and_no_orphans(parent: int) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a parent that was killed cannot stop us
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before
        os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
