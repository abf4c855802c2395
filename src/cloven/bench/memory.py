"""How much private memory the trusted process needs, with its pads in a store on disk: for `cloven bench slip` and `cloven bench memory`.

A process loads OUT/trusted, opens a session with a filled store and decodes. Then, with the KV cache alive, its memory that no file backs
is read, and taken apart, together with the weights that are mapped from the bundle's files: they are read for every token, so they count.

    interpreter    what the process had before it loaded anything: Python, torch, transformers
    KV cache       which an unsplit model has as well
    model          factors, embeddings, norms, scales, permutations, mapped or not
    rest           what checks need (S and S W), pads read ahead, buffers, what the allocator keeps

Pads are records of memory-mapped files: their pages are not private. The trusted side's copy of OUT/exposed is not needed with a store. The
memory that is shared with the worker (`cloven.wire.lane`) holds masked values only and is not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from cloven.bench.ledgers import ledgers_in
from cloven.bench.runner import CONTEXT
from cloven.bench.runner_process import RunnerProcess
from cloven.bundle.bundle import Bundle
from cloven.cluster.worker_process import WorkerProcess
from cloven.masks.pad_store import AHEAD
from cloven.slip.config import SlipConfig
from cloven.slip.pads import fill, fill_job
from cloven.zoo.random_bundle import write_random_bundle
from cloven.zoo.shapes import linear_parameters, shape_config

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes; the unsplit model is bf16. `private_bytes` is interpreter + KV cache + model + rest.

    `private_share` is (private − interpreter − KV cache) / unsplit, that is (model + rest) / unsplit, with the layers that were measured.
    `private_share_all_layers` is the same for all layers of the shape: the unsplit model and the trusted one by their parameters per layer
    and besides, both exactly, and the rest as if all of it grew with the layers, which is more than it does.
    """

    shape: str
    precision: str
    secret_fraction: float
    layers: int
    layers_of_shape: int
    tokens: int
    private_bytes: int
    interpreter_bytes: int
    kv_cache_bytes: int
    model_bytes: int
    model_mapped_bytes: int
    factor_bytes: int
    embedding_bytes: int
    rest_bytes: int
    pads_mapped_bytes: int
    unsplit_bytes: int
    private_share: float
    model_bytes_all_layers: int
    unsplit_bytes_all_layers: int
    private_share_all_layers: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def bench_memory(shape: str, progress: Progress, *, layers: int | None = None, precision: str = "int8", tokens: int = 8) -> MemoryFigures:
    """Measure a shape by itself: without the unsplit model there is room for all layers of a large one.

    Args:
        layers: decoder layers; None: all.
        tokens: to decode.

    Raises:
        BadInput: unknown shape or precision.
    """
    config, parameters = shape_config(shape, layers), SlipConfig(precision=precision)
    with tempfile.TemporaryDirectory(prefix="cloven-bench-") as folder:
        progress("writing random weights", 0, 1)
        bundle = write_random_bundle(config, Path(folder) / "out", parameters)
        progress("filling pads, loading, decoding", 0, 1)
        with WorkerProcess(bundle.exposed) as worker:
            return measured_memory(bundle, worker.address, shape, config, parameters, tokens)


def measured_memory(bundle: Bundle, address: str, shape: str, config: LlamaConfig, parameters: SlipConfig, tokens: int) -> MemoryFigures:
    """Fill a store beside the bundle, decode `tokens` tokens in a fresh process, and take its memory apart."""
    folder = bundle.trusted.parent
    with ledgers_in(folder):
        fill(fill_job(bundle.trusted, CONTEXT + tokens + AHEAD, store=folder / "pads"))
        mapped = sum(path.stat().st_size for path in (folder / "pads").glob("*.pads"))
        with RunnerProcess("stored", str(bundle.trusted), address, str(folder / "pads")) as runner:
            return memory_figures(
                shape, config, parameters, tokens, mapped, runner.before, runner.ask("memory_while_decoding", tokens=tokens)
            )


def memory_figures(
    shape: str, config: LlamaConfig, parameters: SlipConfig, tokens: int, mapped: int, interpreter: int, read: dict[str, Any]
) -> MemoryFigures:
    """What a process's memory was: see the module, and `Runner.memory_while_decoding` for `read`."""
    whole = shape_config(shape)
    growth = whole.num_hidden_layers / config.num_hidden_layers
    private = read["anonymous"] + read["mapped"]
    rest = private - interpreter - read["cache"] - read["parameters"]
    model = round(growth * read["layers"]) + read["parameters"] - read["layers"]
    return MemoryFigures(
        shape=shape,
        precision=parameters.precision,
        secret_fraction=parameters.secret_fraction,
        layers=config.num_hidden_layers,
        layers_of_shape=whole.num_hidden_layers,
        tokens=CONTEXT + tokens,
        private_bytes=private,
        interpreter_bytes=interpreter,
        kv_cache_bytes=read["cache"],
        model_bytes=read["parameters"],
        model_mapped_bytes=read["mapped"],
        factor_bytes=read["factors"],
        embedding_bytes=read["embeddings"],
        rest_bytes=rest,
        pads_mapped_bytes=mapped,
        unsplit_bytes=unsplit_bytes(config),
        private_share=(read["parameters"] + rest) / unsplit_bytes(config),
        model_bytes_all_layers=model,
        unsplit_bytes_all_layers=unsplit_bytes(whole),
        private_share_all_layers=(model + growth * rest) / unsplit_bytes(whole),
    )


def unsplit_bytes(config: LlamaConfig) -> int:
    """Of the unsplit model's bf16 parameters; an embedding tied to the head counts once."""
    per_layer, head = linear_parameters(config)
    layers, tables = int(config.num_hidden_layers), 1 if config.tie_word_embeddings else 2
    return 2 * (layers * per_layer + head * tables + (2 * layers + 1) * int(config.hidden_size))
