"""Tasks for the engines' tests: in a module, because other processes import them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cloven.errors import BadInput
from cloven.field.prg import SecretStream


@dataclass(frozen=True)
class Job:
    folder: str
    number: int

    @property
    def path(self) -> Path:
        return Path(self.folder) / f"{self.number}.json"


def jobs(folder: Path, count: int) -> list[Job]:
    return [Job(str(folder), number) for number in range(count)]


def note(job: Job) -> None:
    """Where it ran, and with how many threads."""
    job.path.write_text(json.dumps({"process": os.getpid(), "threads": torch.get_num_threads()}))


def noted(jobs: list[Job]) -> list[dict[str, int]]:
    return [json.loads(job.path.read_text()) for job in jobs]


def compute(job: Job) -> None:
    """The bits of a float32 product and of a factorisation: they depend on the order of sums, and so on the number of threads."""
    matrix = SecretStream(bytes(32), f"test/{job.number}").normal(300, 500).float()
    u, s, _ = torch.linalg.svd(matrix @ matrix.t())
    job.path.write_text(json.dumps(hashlib.sha256(u.numpy().tobytes() + s.numpy().tobytes()).hexdigest()))


def fail_at_two(job: Job) -> None:
    if job.number == 2:
        raise BadInput("number two is bad")
    note(job)


def break_at_two(job: Job) -> None:
    if job.number == 2:
        raise ZeroDivisionError("a bug with a secret in its message")
    note(job)


def die_at_two(job: Job) -> None:
    """As the kernel does when memory runs out."""
    if job.number == 2:
        os._exit(137)
    note(job)


def last_long(job: Job) -> None:
    note(job)
    time.sleep(120)


def fail_while_others_last_long(job: Job) -> None:
    if job.number == 0:
        deadline = time.monotonic() + 60
        while not Job(job.folder, 1).path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        raise BadInput("number zero is bad")
    last_long(job)
