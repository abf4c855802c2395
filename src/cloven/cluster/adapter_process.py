"""A real `cloven adapter-server` in a process of its own."""

from __future__ import annotations

from pathlib import Path

from cloven.cluster.server_process import ServerProcess


class AdapterServerProcess(ServerProcess):
    """`cloven adapter-server SERVER --listen ADDRESS …` as a subprocess; a context manager.

    Args:
        server: OUT/server.
        address: where it listens; None: an ipc address in a folder of its own.
        arguments: more arguments for the command line.
    """

    def __init__(self, server: Path, address: str | None = None, *arguments: str) -> None:
        super().__init__("adapter-server", server, address, *arguments)
