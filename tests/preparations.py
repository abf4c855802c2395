"""Preparations of SLIP bundles that are compared, interrupted and damaged."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloven.bundle.bundle import Bundle
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from tests.split_models import scratch, tiny, tiny_folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of both halves, the key included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_relative_to(folder / ".work")
    }


@functools.cache
def reference(precision: str = "int8x2") -> Bundle:
    """An uninterrupted split of the tiny Llama's directory; its key is for others to be compared with it. Not to be changed on disk."""
    return prepare_slip(tiny_folder("llama"), scratch() / f"reference-{precision}", SlipConfig(precision=precision), engine="inline")


def key_of(bundle: Bundle) -> Path:
    return bundle.trusted / "split.key"


def again(out: Path, **options: Any) -> Bundle:
    """The reference's split once more, with its key."""
    bundle = reference()
    settings = {"key": key_of(bundle), "engine": "inline", **options}
    return prepare_slip(settings.pop("model", tiny_folder("llama")), out, SlipConfig(precision="int8x2"), **settings)


def own_folder(where: Path, family: str = "llama") -> Path:
    """A copy of a tiny model's directory, to be changed."""
    shutil.copytree(tiny_folder(family), where)
    return where


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any], keep_time: bool = False) -> None:
    """Change the tensors of a model directory with one file."""
    path = folder / "model.safetensors"
    state = path.stat()
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(held)
    save_file(held, path, metadata={"format": "pt"})
    if keep_time:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


class Stop(BaseException):
    """An interruption: no Exception."""


def stop_at(step: int) -> Callable[[str, int, int], None]:
    """A `progress` that interrupts at its n-th call."""
    calls = iter(range(step + 1))

    def progress(stage: str, done: int, total: int) -> None:
        del stage, done, total
        if next(calls) == step:
            raise Stop

    return progress


def steps_of(out: Path, **options: Any) -> int:
    """How often `progress` is called."""
    count = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal count
        del stage, done, total
        count += 1

    again(out, progress=progress, **options)
    return count


def fine_tune(where: Path, rank: int = 2, family: str = "llama", size: float = 0.05, seed: int = 7) -> Path:
    """A model directory: the tiny model plus a difference of low rank in every linear layer, in float32."""
    own_folder(where, family)
    generator = torch.Generator().manual_seed(seed)
    names = [f"{name}.weight" for name, module in tiny(family).named_modules() if isinstance(module, torch.nn.Linear)]

    def change(held: dict[str, Tensor]) -> None:
        for name in names:
            n, k = held[name].shape
            delta = torch.randn(n, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
            held[name] += size * held[name].norm() / delta.norm() * delta

    edit_weights(where, change)
    return where


def record(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
