"""Workers for many small bundles in one process of their own: starting a Python with PyTorch for each would take most of the time.

As a script: reads lines `EXPOSED ADDRESS` from standard input, serves each from a thread, answers `ready`; ends with its input.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from cloven.bundle.bundle import Bundle


class Workers:
    """The parent's side: a context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cl")
        command = [sys.executable, "-m", "tests.end_to_end.serve_many"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        self._addresses: dict[str, str] = {}

    def address(self, bundle: Bundle) -> str:
        """Where the bundle is served; started on first use."""
        if bundle.id not in self._addresses:
            assert self.process.stdin is not None and self.process.stdout is not None
            self._addresses[bundle.id] = f"ipc://{self._folder.name}/{len(self._addresses)}"
            self.process.stdin.write(f"{bundle.exposed} {self._addresses[bundle.id]}\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "ready\n"
        return self._addresses[bundle.id]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
        self._folder.cleanup()


def main() -> None:
    """The child's side."""
    from cloven.worker.service import Worker

    workers, threads = [], []
    for line in sys.stdin:
        exposed, address = line.split()
        workers.append(Worker(exposed, address))
        threads.append(threading.Thread(target=workers[-1].serve))
        threads[-1].start()
        print("ready", flush=True)
    for worker in workers:
        worker.stop()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
