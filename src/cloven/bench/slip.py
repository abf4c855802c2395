"""`cloven bench slip`: a split model against the unsplit one, in one interleaved run.

Three processes on the same cores: the unsplit model (bf16, transformers), the trusted process and a real worker, over ipc. Weights,
codes and factors are random. Rounds of all measurements follow one another, so that a slow minute of the machine hits all of them;
figures are medians.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cloven.bench.decoding import BatchFigures, RttFigures, batch_figures, batches_decoded, check_measurements, rtt_figures, rtts_decoded
from cloven.bench.runner import CONTEXT
from cloven.bench.runner_process import RunnerProcess, median_of
from cloven.cluster.worker_process import WorkerProcess
from cloven.engine.memory import anonymous_bytes, available_bytes
from cloven.errors import BadInput
from cloven.field.selection import select_backend
from cloven.slip.config import SlipConfig
from cloven.zoo.random_bundle import write_random_bundle
from cloven.zoo.shapes import linear_parameters, shape_config

MEMORY_SHARE = 0.7
ROUNDS = 5
PREFILL = 512
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SlipBench:
    """Medians of one interleaved run. Times in seconds, memory in bytes; the unsplit model is bf16;
    `products` names the back end of the worker and of the pads."""

    shape: str
    precision: str
    products: str
    layers: int
    layers_of_shape: int
    rounds: int
    tokens_per_round: int
    decode_ratio: float
    decode_ratio_pads_inline: float
    prefill_ratio: float
    pad_ratio: float
    trusted_memory_share: float
    tokens_per_s_unsplit: float
    tokens_per_s_split: float
    tokens_per_s_split_pads_inline: float
    prefill_512_s_unsplit: float
    prefill_512_s_split: float
    pad_seconds_per_token: float
    worker_seconds_per_token: float
    waiting_seconds_per_token: float
    exchanges_per_token: float
    bytes_up_per_token: float
    bytes_down_per_token: float
    unsplit_parameter_bytes: int
    trusted_model_bytes: int
    trusted_private_bytes: int
    trusted_interpreter_bytes: int
    unsplit_private_bytes: int
    worker_private_bytes: int
    simulated_rtts: list[RttFigures] = field(default_factory=list)
    batches: list[BatchFigures] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def bench_slip(
    shape: str,
    progress: Progress,
    *,
    tokens: int = 8,
    layers: int | None = None,
    precision: str = "int8",
    rounds: int = ROUNDS,
    rtts_ms: Sequence[float] = (),
    batches: Sequence[int] = (),
) -> SlipBench:
    """Measure a shape.

    Args:
        tokens: decoded tokens per round.
        layers: decoder layers; None: as many as fit in 70 % of the memory that is free.
        rtts_ms: round trips to simulate, in milliseconds: in every round, at most 4 tokens are decoded with each.
        batches: numbers of sequences to decode at once: in every round, at most 8 steps with each.

    Raises:
        BadInput: unknown shape, not even one layer fits, or an impossible round trip or batch.
    """
    check_measurements(rtts_ms, batches)
    rtts_ms, batches = tuple(dict.fromkeys(rtts_ms)), tuple(dict.fromkeys(batches))
    layers = layers_that_fit(shape, precision) if layers is None else layers
    config = shape_config(shape, layers)
    with tempfile.TemporaryDirectory(prefix="cloven-bench-") as folder:
        progress("writing random weights", 0, 1)
        bundle = write_random_bundle(config, Path(folder) / "out", SlipConfig(precision=precision))
        progress("loading", 0, 1)
        series: dict[str, list[dict[str, Any]]] = {name: [] for name in ("plain", "ready", "inline", "plain_prefill", "prefill", "pads")}
        with (
            WorkerProcess(bundle.exposed) as worker,
            RunnerProcess("split", str(bundle.trusted), worker.address) as split,
            RunnerProcess("plain", shape, str(layers)) as plain,
        ):
            for done in range(rounds + 1):  # the first round warms up
                progress("rounds", done, rounds + 1)
                one = _round(plain, split, tokens) | rtts_decoded(split, tokens, rtts_ms) | batches_decoded(plain, split, tokens, batches)
                if done:
                    for name, result in one.items():
                        series.setdefault(name, []).append(result)
            memory = split.ask("memory")
            plain_memory = plain.ask("memory")
            worker_bytes = anonymous_bytes(worker.pid)
    summary = _summarise(shape, precision, layers, rounds, tokens, series, (memory, split.before), plain_memory, worker_bytes)
    return replace(
        summary,
        simulated_rtts=[rtt_figures(rtt, series[f"rtt {rtt}"]) for rtt in rtts_ms],
        batches=[batch_figures(batch, series[f"plain batch {batch}"], series[f"batch {batch}"]) for batch in batches],
    )


def _round(plain: RunnerProcess, split: RunnerProcess, tokens: int) -> dict[str, dict[str, Any]]:
    result = {"plain": plain.ask("decode", tokens=tokens)}
    rows = tokens + CONTEXT
    result["pads"] = {"per_row": split.ask("pads", rows=rows)["seconds"] / rows}
    result["ready"] = split.ask("decode", tokens=tokens)
    split.ask("drop_pads")
    result["inline"] = split.ask("decode", tokens=max(2, tokens // 2))
    result["plain_prefill"] = plain.ask("prefill", tokens=PREFILL)
    split.ask("pads", rows=PREFILL)
    result["prefill"] = split.ask("prefill", tokens=PREFILL)
    split.ask("drop_pads")
    return result


def layers_that_fit(shape: str, precision: str) -> int:
    """How many decoder layers fit in 70 % of the available memory: the unsplit model, the exposed matrices, factors and pads.

    Raises:
        BadInput: not even one.
    """
    config = shape_config(shape)
    per_layer, head = linear_parameters(config)
    terms = SlipConfig(precision=precision).terms
    widths = (2 * config.hidden_size + 3 * config.intermediate_size + 4 * config.hidden_size) * (1 + terms)

    def cost(parameters: int) -> float:
        return parameters * (2 + terms + 4 * 0.03)

    fixed = cost(head) + 2 * 2 * head + 4 * PREFILL * config.vocab_size
    left = MEMORY_SHARE * available_bytes() - fixed
    fitting = int(left // (cost(per_layer) + 4 * PREFILL * widths))
    if fitting < 1:
        raise BadInput(f"{shape}: not even one layer fits in 70 % of the free memory")
    return min(fitting, int(config.num_hidden_layers))


def _summarise(
    shape: str,
    precision: str,
    layers: int,
    rounds: int,
    tokens: int,
    series: dict[str, list[dict[str, Any]]],
    split_memory: tuple[dict[str, Any], int],
    plain_memory: dict[str, Any],
    worker_bytes: int,
) -> SlipBench:
    def seconds(name: str) -> float:
        return median_of(series[name])

    def middle(name: str, key: str) -> float:
        return statistics.median(float(result[key]) for result in series[name])

    memory, interpreter = split_memory
    pad, away = middle("pads", "per_row"), middle("ready", "seconds_worker")
    return SlipBench(
        shape=shape,
        precision=precision,
        products=select_backend().name,
        layers=layers,
        layers_of_shape=shape_config(shape).num_hidden_layers,
        rounds=rounds,
        tokens_per_round=tokens,
        decode_ratio=seconds("plain") / seconds("ready"),
        decode_ratio_pads_inline=seconds("plain") / seconds("inline"),
        prefill_ratio=seconds("prefill") / seconds("plain_prefill"),
        pad_ratio=pad / away,
        trusted_memory_share=memory["parameters"] / plain_memory["parameters"],
        tokens_per_s_unsplit=1 / seconds("plain"),
        tokens_per_s_split=1 / seconds("ready"),
        tokens_per_s_split_pads_inline=1 / seconds("inline"),
        prefill_512_s_unsplit=seconds("plain_prefill"),
        prefill_512_s_split=seconds("prefill"),
        pad_seconds_per_token=pad,
        worker_seconds_per_token=away,
        waiting_seconds_per_token=middle("ready", "seconds_waiting"),
        exchanges_per_token=middle("ready", "exchanges"),
        bytes_up_per_token=middle("ready", "bytes_up"),
        bytes_down_per_token=middle("ready", "bytes_down"),
        unsplit_parameter_bytes=plain_memory["parameters"],
        trusted_model_bytes=memory["parameters"],
        trusted_private_bytes=memory["anonymous"],
        trusted_interpreter_bytes=interpreter,
        unsplit_private_bytes=plain_memory["anonymous"],
        worker_private_bytes=worker_bytes,
    )
