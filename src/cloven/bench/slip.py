"""`cloven bench slip`: a split model against the unsplit one, in one interleaved run.

Processes on the same cores: the unsplit model (bf16, transformers), the trusted process and a real worker, over ipc; one that measures
plain matrix products; and other runtimes, where they are asked for. Weights, codes and factors are random. Rounds of all measurements
follow one another, so that a slow minute of the machine hits all of them; figures are medians.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloven.bench.decoding import batch_figures, batches_decoded, check_measurements, rtt_figures, rtts_decoded
from cloven.bench.memory import measured_memory
from cloven.bench.other_runtimes import BYTES_PER_PARAMETER, check_runtimes, start_runtime
from cloven.bench.runner import CONTEXT
from cloven.bench.runner_process import RunnerProcess
from cloven.bench.slip_figures import PREFILL, Footprint, Series, SlipBench, summarise
from cloven.cluster.worker_process import WorkerProcess
from cloven.engine.memory import anonymous_bytes, available_bytes
from cloven.errors import BadInput
from cloven.slip.config import SlipConfig
from cloven.zoo.random_bundle import write_random_bundle
from cloven.zoo.shapes import linear_parameters, shape_config

MEMORY_SHARE = 0.7
ROUNDS = 5
Progress = Callable[[str, int, int], None]


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
    against: Sequence[str] = (),
) -> SlipBench:
    """Measure a shape.

    Args:
        tokens: decoded tokens per round.
        layers: decoder layers; None: as many as fit in 70 % of the memory that is free.
        rtts_ms: round trips to simulate, in milliseconds: in every round, at most 4 tokens are decoded with each.
        batches: numbers of sequences to decode at once: in every round, at most 8 steps with each.
        against: other runtimes that decode in every round, see `other_runtimes`.

    Raises:
        BadInput: unknown shape, not even one layer fits, an impossible round trip or batch, or a runtime that is unknown or not installed.
    """
    check_measurements(rtts_ms, batches)
    rtts_ms, batches, against = tuple(dict.fromkeys(rtts_ms)), tuple(dict.fromkeys(batches)), check_runtimes(against)
    parameters = SlipConfig(precision=precision)
    layers = layers_that_fit(shape, precision, against) if layers is None else layers
    config = shape_config(shape, layers)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cloven-bench-")))
        progress("writing random weights", 0, 1)
        bundle = write_random_bundle(config, folder / "out", parameters)
        worker = stack.enter_context(WorkerProcess(bundle.exposed))
        with ExitStack() as running:
            others = {}
            for name in against:
                progress(f"loading {name}", 0, 1)
                others[name] = running.enter_context(start_runtime(name, shape, layers, tokens, folder))
            progress("loading", 0, 1)
            rates = running.enter_context(RunnerProcess(shape, module="cloven.bench.matrix_rates"))
            split = running.enter_context(RunnerProcess("split", str(bundle.trusted), worker.address))
            plain = running.enter_context(RunnerProcess("plain", shape, str(layers)))
            series: Series = {}
            for done in range(rounds + 1):  # the first round warms up
                progress("rounds", done, rounds + 1)
                one = _round(plain, split, tokens) | {"rates": rates.ask("products", rows=PREFILL)}
                one |= {name: other.ask("decode", tokens=tokens) for name, other in others.items()}
                one |= rtts_decoded(split, tokens, rtts_ms) | batches_decoded(plain, split, tokens, batches)
                for name, result in one.items() if done else ():
                    series.setdefault(name, []).append(result)
            footprint = Footprint(split.ask("memory"), split.before, plain.ask("memory"), anonymous_bytes(worker.pid))
            ready = {name: other.ready for name, other in others.items()}
        progress("measuring memory", 0, 1)
        memory = measured_memory(bundle, worker.address, shape, config, parameters, tokens)
    return replace(
        summarise(shape, layers, parameters, tokens, series, footprint, memory, ready),
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
    result["many_pads"] = {"per_row": split.ask("pads", rows=PREFILL)["seconds"] / PREFILL}
    result["prefill"] = split.ask("prefill", tokens=PREFILL)
    split.ask("drop_pads")
    return result


def layers_that_fit(shape: str, precision: str, against: Sequence[str] = ()) -> int:
    """How many decoder layers fit in 70 % of the available memory: the unsplit model, the exposed matrices, factors and pads, what measures
    the matrix products (one layer and the head, in bf16 and int8), and the other runtimes.

    Raises:
        BadInput: not even one.
    """
    config = shape_config(shape)
    per_layer, head = linear_parameters(config)
    terms = SlipConfig(precision=precision).terms
    widths = (2 * config.hidden_size + 3 * config.intermediate_size + 4 * config.hidden_size) * (1 + terms)

    others = sum(BYTES_PER_PARAMETER[name] for name in against)

    def cost(parameters: int) -> float:
        return parameters * (2 + terms + 4 * 0.03 + others)

    embeddings = 2 * head * (2 + len(against))
    fixed = cost(head) + embeddings + 3 * per_layer + head + 2 * 4 * PREFILL * config.vocab_size
    left = MEMORY_SHARE * available_bytes() - fixed
    fitting = int(left // (cost(per_layer) + 4 * PREFILL * widths))
    if fitting < 1:
        raise BadInput(f"{shape}: not even one layer fits in 70 % of the free memory")
    return min(fitting, int(config.num_hidden_layers))
