"""A real `cloven enclave` in a process of its own."""

from __future__ import annotations

from pathlib import Path

from cloven.cluster.server_process import ServerProcess


class EnclaveProcess(ServerProcess):
    """`cloven enclave TRUSTED --listen ADDRESS …` as a subprocess; a context manager.

    Args:
        trusted: OUT/trusted.
        address: where it listens; None: an ipc address in a folder of its own.
        arguments: more arguments for the command line.
    """

    def __init__(self, trusted: Path, address: str | None = None, *arguments: str) -> None:
        super().__init__("enclave", trusted, address, *arguments)
