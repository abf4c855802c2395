"""Split models for the tests: bundles prepared once per run, loaded models, and workers in threads or processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import cloven
from cloven.bundle.bundle import Bundle
from cloven.cluster.worker_process import WorkerProcess
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from cloven.slip.session import SlipSession
from cloven.zoo.demo import demo_model_path
from cloven.zoo.tiny import tiny_model
from tests.helpers import serving

PRECISIONS = ("int8", "int8x2")
for _name in ("CLOVEN_WORKER", "CLOVEN_KEYS", "CLOVEN_EXPOSED", "CLOVEN_LOG"):
    os.environ.pop(_name, None)  # settings of the person who runs the tests


@functools.cache
def scratch() -> Path:
    """A folder of this run with a short path (a Unix socket's may have 107 bytes), removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="cl"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny(family: str) -> PreTrainedModel:
    """The unsplit float32 model of a family; not to be changed."""
    return tiny_model(family)


@functools.cache
def tiny_folder(family: str) -> Path:
    """The same, saved as a model directory."""
    folder = scratch() / f"model-{family}"
    tiny(family).save_pretrained(folder)
    return folder


def tiny_bundle(family: str, precision: str = "int8") -> Bundle:
    """A tiny model's split; not to be changed on disk (see `copied`)."""
    return _prepared(family, precision)


def demo_bundle(precision: str = "int8") -> Bundle:
    """The demo model's split at the default 3 %; not to be changed on disk (see `copied`)."""
    return _prepared("demo", precision)


@functools.cache
def _prepared(name: str, precision: str) -> Bundle:
    model = demo_model_path() if name == "demo" else tiny(name)
    return prepare_slip(model, scratch() / f"{name}-{precision}", SlipConfig(precision=precision))


@functools.cache
def demo_model() -> PreTrainedModel:
    """The unsplit demo model in float32; not to be changed."""
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)


@functools.cache
def demo_tokenizer() -> Any:
    """The demo model's tokenizer."""
    return AutoTokenizer.from_pretrained(demo_model_path())


def copied(bundle: Bundle, where: Path) -> Bundle:
    """A bundle's copy, to be damaged."""
    shutil.copytree(bundle.path, where)
    return cloven.open_bundle(where)


def load(trusted: Path, **options: Any) -> PreTrainedModel:
    """The split model in float32."""
    return AutoModelForCausalLM.from_pretrained(trusted, dtype=torch.float32, **options)


@contextlib.contextmanager
def worker_thread(bundle: Bundle) -> Iterator[str]:
    """A real worker over ipc in a thread of this process: its address."""
    with tempfile.TemporaryDirectory(prefix="cl") as folder:
        address = f"ipc://{folder}/w"
        with serving(bundle.exposed, address):
            yield address


@contextlib.contextmanager
def attached(bundle: Bundle, **options: Any) -> Iterator[tuple[PreTrainedModel, SlipSession]]:
    """A loaded model with a session to a worker in a thread."""
    model = load(bundle.trusted)
    with worker_thread(bundle) as address, open_session(model, address, **options) as session:
        yield model, session


@contextlib.contextmanager
def open_session(model: PreTrainedModel, address: str, **options: Any) -> Iterator[SlipSession]:
    """`cloven.attach` with few pads ahead (the machine has better things to do) and a timeout that fails a test early."""
    session = cloven.attach(model, address, **{"look_ahead": 32, "timeout": 20.0, **options})
    assert isinstance(session, SlipSession)
    with session:
        yield session


@contextlib.contextmanager
def worker_process(bundle: Bundle, address: str | None = None, *arguments: str) -> Iterator[WorkerProcess]:
    """A real worker in a process of its own."""
    with WorkerProcess(bundle.exposed, address, *arguments) as worker:
        yield worker


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    """One forward pass: [B, T] -> [B, T, vocabulary]."""
    result: Tensor = model(input_ids=ids, **more).logits
    return result


def random_ids(vocabulary: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids, int64 [batch, length], without 0: that is the tiny models' padding."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: PreTrainedModel, prompt: str, tokens: int, **options: Any) -> list[int]:
    """The demo model's (or its split's) greedy continuation of a prompt."""
    inputs = demo_tokenizer()(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
    new: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return new


def relative_error(y: Tensor, expected: Tensor) -> float:
    """‖y − expected‖ / ‖expected‖."""
    return float(torch.linalg.vector_norm(y - expected) / torch.linalg.vector_norm(expected))


def run_python(script: str, *arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a Python of its own: what is imported there, and in which order, is the script's business alone."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=timeout, env=os.environ | environment
    )


def run_cloven(*arguments: str, stdin: str | None = None, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cloven", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        input=stdin if stdin is not None else "",
        env=os.environ | environment,
    )
