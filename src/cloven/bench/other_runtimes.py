"""Other runtimes beside a split model in `cloven bench slip`: int8 models without any protection, decoding the same shape.

    llama.cpp   Q8_0: int8 codes with a float16 scale for every 32 weights, activations quantised to 8 bits    package llama-cpp-python
    torchao     Int8WeightOnlyConfig: int8 codes with a scale per row, bf16 activations                        package torchao

Each runs in a process of its own on all cores, decodes after the same context as many tokens as the others, and takes its turn in every
round. Weights are random, of the shape's sizes, the head quantised as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloven.bench.runner import CONTEXT
from cloven.bench.runner_process import RunnerProcess, median_of
from cloven.errors import BadInput
from cloven.zoo.random_gguf import write_random_gguf
from cloven.zoo.shapes import shape_config

LLAMA_CPP, TORCHAO = "llama.cpp", "torchao"
PACKAGES = {LLAMA_CPP: {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}, TORCHAO: {"torchao": "torchao"}}
BYTES_PER_PARAMETER = {LLAMA_CPP: 34 / 32, TORCHAO: 3.0}  # torchao: bf16 while it is quantised, or int8 twice in frozen compiled code
_SHORTEST_CACHE = 64


@dataclass(frozen=True)
class AgainstFigures:
    """One of the others: the median of its tokens per second, and the split model's over it (pads ready; above 1: the split one is faster).

    `details` is how it was compiled (llama.cpp), or which of the `ways` to run it was measured (torchao): the fastest of those that were
    tried before the rounds, with the tokens per second that they reached at best. `decode_ratio_all_layers`: see `SlipBench`; the other's
    time for the layers and for the head is not known apart, so that its time is taken to grow with its weights, which it reads once per
    token.
    """

    name: str
    version: str
    details: str
    tokens_per_s: float
    decode_ratio: float
    decode_ratio_all_layers: float
    ways: dict[str, float] = field(default_factory=dict)


def check_runtimes(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        BadInput: not one of them, or not installed: the message says what to install.
    """
    for name in names:
        if name not in PACKAGES:
            raise BadInput(f"--against {name}: choose one of {', '.join(PACKAGES)}")
        missing = [package for module, package in PACKAGES[name].items() if importlib.util.find_spec(module) is None]
        if missing:
            raise BadInput(f"--against {name}: not installed; pip install {' '.join(missing)}")
    return tuple(dict.fromkeys(names))


def start_runtime(name: str, shape: str, layers: int, tokens: int, folder: Path) -> RunnerProcess:
    """Write what it needs into `folder`, start its process, wait until it has loaded (and compiled: minutes)."""
    length = str(max(_SHORTEST_CACHE, CONTEXT + tokens))
    if name == LLAMA_CPP:
        path = write_random_gguf(shape_config(shape, layers), folder / "random.gguf")
        return RunnerProcess(str(path), length, module="cloven.bench.llama_cpp_runner")
    return RunnerProcess(shape, str(layers), length, str(folder / "inductor"), module="cloven.bench.torchao_runner")


def against_figures(
    name: str, ready: dict[str, Any], results: list[dict[str, Any]], split_seconds: float, split_all: float, growth: float
) -> AgainstFigures:
    """What the rounds gave.

    Args:
        ready: what the process said of itself.
        split_seconds: of the split model per token; split_all: the same, for all layers of the shape.
        growth: weights of all layers and the head / of those that were measured.
    """
    seconds = median_of(results)
    return AgainstFigures(
        name=name,
        version=str(ready["version"]),
        details=str(ready["details"]),
        tokens_per_s=1 / seconds,
        decode_ratio=seconds / split_seconds,
        decode_ratio_all_layers=growth * seconds / split_all,
        ways=dict(ready.get("tokens_per_s", {})),
    )
