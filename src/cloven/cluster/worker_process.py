"""A real `cloven worker` in a process of its own."""

from __future__ import annotations

from pathlib import Path

from cloven.cluster.server_process import ServerProcess


class WorkerProcess(ServerProcess):
    """`cloven worker EXPOSED --listen ADDRESS …` as a subprocess; a context manager.

    Args:
        exposed: OUT/exposed.
        address: where it listens; None: an ipc address in a folder of its own.
        arguments: more arguments for the command line.
    """

    def __init__(self, exposed: Path, address: str | None = None, *arguments: str) -> None:
        super().__init__("worker", exposed, address, *arguments)
