"""`cloven bench prepare`: how long a checkpoint takes to prepare, and how much memory its jobs need.

A random bf16 checkpoint of the shape is written to a temporary folder (disk: about three bytes per parameter) and prepared with a pool of
processes. Memory is sampled: that which is private and not backed by a file (the checkpoint is memory-mapped), of every process.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloven.engine.memory import anonymous_bytes
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from cloven.zoo.random_checkpoint import write_random_checkpoint
from cloven.zoo.shapes import linear_parameters, shape_config

_SAMPLE_SECONDS = 0.05
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrepareBench:
    """Seconds of preparation, and peaks of private memory in bytes: of one job's process, and of all processes together.

    `job_bound_bytes` is what a job may need: five times the largest group in float32, plus 1 GB.
    """

    shape: str
    layers: int
    layers_of_shape: int
    precision: str
    engine: str
    seconds: float
    parameters: int
    job_peak_bytes: int
    job_bound_bytes: int
    parent_peak_bytes: int
    total_peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def bench_prepare(
    shape: str,
    progress: Progress = lambda stage, done, total: None,
    *,
    layers: int | None = None,
    precision: str = "int8",
    engine: str = "pool",
    folder: Path | None = None,
) -> PrepareBench:
    """Prepare a random checkpoint.

    Args:
        layers: decoder layers; None: all.
        folder: where there is room; None: the system's temporary folder.

    Raises:
        BadInput: unknown shape or engine.
    """
    config = shape_config(shape, layers)
    per_layer, head = linear_parameters(config)
    largest = max(head, 2 * config.hidden_size * config.intermediate_size)
    with tempfile.TemporaryDirectory(prefix="cloven-bench-", dir=folder) as place:
        progress("writing random weights", 0, 1)
        model = write_random_checkpoint(config, Path(place) / "model")
        with _sampled() as peaks:
            started = time.perf_counter()
            prepare_slip(model, Path(place) / "out", SlipConfig(precision=precision), progress, engine=engine)
            seconds = time.perf_counter() - started
    return PrepareBench(
        shape=shape,
        layers=config.num_hidden_layers,
        layers_of_shape=shape_config(shape).num_hidden_layers,
        precision=precision,
        engine=engine,
        seconds=seconds,
        parameters=config.num_hidden_layers * per_layer + head,
        job_peak_bytes=peaks["job"],
        job_bound_bytes=5 * 4 * largest + 10**9,
        parent_peak_bytes=peaks["parent"],
        total_peak_bytes=peaks["total"],
    )


@contextmanager
def _sampled() -> Iterator[dict[str, int]]:
    """Peaks of private memory, while it lasts: of this process, of the largest child that begins meanwhile, and of all together."""
    peaks = {"job": 0, "parent": 0, "total": 0}
    ended, others = threading.Event(), set(_children(os.getpid()))

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            own = anonymous_bytes()
            jobs = [anonymous_bytes(pid) for pid in _children(os.getpid()) if pid not in others]
            for name, value in (("job", max(jobs, default=0)), ("parent", own), ("total", own + sum(jobs))):
                peaks[name] = max(peaks[name], value)

    thread = threading.Thread(target=sample, name="cloven-memory", daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    return found
