"""How much memory a preparation takes: that of its largest group, whatever the model's size.

Measured is anonymous memory (RssAnon of /proc/PID/status), sampled every few milliseconds: pages of the memory-mapped checkpoint are
file-backed, shared with every other process, and given back under pressure.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import cloven

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
GB = 2**30
SCRIPT = """
import sys
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip

if __name__ == "__main__":
    model, out, precision, engine, base = sys.argv[1:]
    config = SlipConfig(0.03, None, precision, "none" if base else "mixing", "public-base" if base else "private")
    print("ready", flush=True)
    prepare_slip(model, out, config, lambda *step: print(*step, flush=True), engine=engine, public_base=base or None)
"""


def random_llama(folder: Path, layers: int, hidden: int, intermediate: int, shard_layers: int = 4, seed: int = 0) -> int:
    """A random bfloat16 checkpoint in shards with an index: its size in bytes. Never in memory as a whole."""
    folder.mkdir()
    heads = hidden // 64
    LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    size = 0

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal size
        tensors = {key: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))
        size += sum(tensor.nbytes for tensor in tensors.values())

    for first in range(0, layers, shard_layers):
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + shard_layers, layers)):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.self_attn.{kind}_proj.weight": (hidden, hidden) for kind in "qkvo"}
            shapes |= {f"{prefix}.mlp.{kind}_proj.weight": (intermediate, hidden) for kind in ("gate", "up")}
            shapes |= {f"{prefix}.mlp.down_proj.weight": (hidden, intermediate)}
            shapes |= {f"{prefix}.{kind}_layernorm.weight": (hidden,) for kind in ("input", "post_attention")}
        save(f"model-{first:05d}.safetensors", shapes)
    save(
        "model-last.safetensors",
        {"model.embed_tokens.weight": (256, hidden), "lm_head.weight": (256, hidden), "model.norm.weight": (hidden,)},
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    return size


def anonymous(process: int) -> int:
    """Bytes of anonymous memory of a process; 0 if it has gone."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return 0


class Peaks(threading.Thread):
    """Samples a process and its descendants: the peak of each, by process id."""

    def __init__(self, process: int, seconds: float) -> None:
        super().__init__(daemon=True)
        self.process, self.seconds, self.of, self.ended = process, seconds, {process: 0}, threading.Event()

    def run(self) -> None:
        known, looked = [self.process], 0.0
        while not self.ended.wait(self.seconds):
            if time.monotonic() - looked > 0.2:
                looked = time.monotonic()
                with contextlib.suppress(psutil.Error):
                    known = [self.process, *(child.pid for child in psutil.Process(self.process).children(recursive=True))]
            for process in known:
                self.of[process] = max(self.of.get(process, 0), anonymous(process))


def measured(tmp_path: Path, model: Path, precision: str, engine: str, base: str = "") -> tuple[int, int, list[int]]:
    """(before the first job, peak of the process that prepares, peaks of the processes that it starts), bytes."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [str(model), str(tmp_path / "out"), precision, engine, base]
    with subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.stdout.readline()  # the plan is made
        before = anonymous(process.pid)
        peaks = Peaks(process.pid, 0.003)
        peaks.start()
        for _ in process.stdout:
            pass
        peaks.ended.set()
        peaks.join()
    assert process.returncode == 0
    cloven.open_bundle(tmp_path / "out")
    return before, peaks.of.pop(process.pid), list(peaks.of.values())


@pytest.mark.parametrize("origin", [pytest.param("private", marks=pytest.mark.long), "public-base"])
def test_a_job_takes_less_than_five_times_its_group(tmp_path: Path, origin: str) -> None:
    """The short form: one layer, with a largest group of 64 MB in float32, counted from where the jobs begin: a quarter of the gigabyte."""
    random_llama(tmp_path / "model", 1, 1024, 8192)
    base = ""
    if origin == "public-base":
        random_llama(tmp_path / "base", 1, 1024, 8192, seed=1)
        base = str(tmp_path / "base")
    largest = 2 * 1024 * 8192 * 4
    before, peak, children = measured(tmp_path, tmp_path / "model", "int8x2", "inline", base)
    print(f"{origin}: {(peak - before) / largest:.2f} times the largest group in float32")
    assert children == [] or max(children) == 0
    assert peak - before < 5 * largest + GB // 4


@pytest.mark.long
def test_a_head_with_a_large_vocabulary(tmp_path: Path) -> None:
    """As Gemma's smallest: 262,144 x 640, where an exact factorisation would take six times the matrix."""
    code = """
import sys, time, torch
from cloven.field.prg import SecretStream
from cloven.slip.decomposition import split, spectrum
torch.set_num_threads(1)
w = torch.randn(262144, 640)
print("ready", flush=True)
sys.stdin.readline()
split(w, 20, spectrum(w), SecretStream(bytes(32), "test"), out=w)
"""
    largest = 262144 * 640 * 4
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == "ready\n"
        peaks = Peaks(process.pid, 0.003)
        peaks.start()
        process.communicate("go\n")
        peaks.ended.set()
        peaks.join()
    assert process.returncode == 0
    print(f"{peaks.of[process.pid] / GB:.2f} GB, {peaks.of[process.pid] / largest:.2f} times the matrix in float32")
    assert largest < peaks.of[process.pid] < 5 * largest + GB


@pytest.mark.long
@pytest.mark.parametrize("origin", ["private", "public-base"])
def test_a_checkpoint_of_two_gigabytes(tmp_path: Path, origin: str) -> None:
    layers, hidden, intermediate = 15, 2048, 8192
    size = random_llama(tmp_path / "model", layers, hidden, intermediate)
    assert size > 2e9
    base = ""
    if origin == "public-base":
        random_llama(tmp_path / "base", layers, hidden, intermediate, seed=1)
        base = str(tmp_path / "base")
    largest = 2 * hidden * intermediate * 4
    started = time.monotonic()
    _, parent, children = measured(tmp_path, tmp_path / "model", "int8x2", "pool", base)
    print(
        f"{origin}: {time.monotonic() - started:.0f} s, parent {parent / GB:.2f} GB, jobs {[round(peak / GB, 2) for peak in children]} GB"
    )
    assert len([peak for peak in children if peak > largest]) >= 1  # jobs were seen at work
    assert max(parent, *children) < 5 * largest + GB
