"""The figures of `cloven bench slip`, from what the rounds and the processes gave."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from cloven.bench.decoding import BatchFigures, RttFigures
from cloven.bench.matrix_rates import RateFigures, rate_figures
from cloven.bench.memory import MemoryFigures
from cloven.bench.other_runtimes import AgainstFigures, against_figures
from cloven.bench.runner_process import median_of
from cloven.field.selection import select_backend
from cloven.slip.config import SlipConfig
from cloven.zoo.shapes import linear_parameters, shape_config

PREFILL = 512
Series = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class SlipBench:
    """Medians of one interleaved run. Times in seconds, memory in bytes; the unsplit model is bf16;
    `products` names the back end of the worker and of the pads.

    `decode_ratio_all_layers`, `seconds_per_token_…_all_layers`: with all layers of the shape: the time in the decoder layers, times all
    layers / those that were measured, and the time besides (embedding, last norm, head) as it was.
    `prefill_floor`: four int8 products in the time of one bf16 product, see `matrix_rates.RateFigures`: the least that `prefill_ratio` can
    be where products are all there is; `prefill_share_of_floor` is floor / ratio. Attention, norms and whatever else both models do alike
    is left out of the floor: where it takes long, the ratio can fall below the floor, and the share rise above 1.
    `pad_share_of_int8_peak`: the time that the products of a pad take by themselves, by the fastest int8 product that was measured, over
    the time that a pad takes, random numbers, reduction and check included; for PREFILL pads at a time.
    `trusted_memory_share`: of the models' parameters. `trusted_private_bytes`: after all rounds, which held pads for a prefill in memory,
    weights that are mapped from files counted; with pads on disk, and taken apart: `memory`.
    """

    shape: str
    precision: str
    products: str
    layers: int
    layers_of_shape: int
    rounds: int
    tokens_per_round: int
    decode_ratio: float
    decode_ratio_all_layers: float
    decode_ratio_pads_inline: float
    prefill_ratio: float
    prefill_floor: float
    prefill_share_of_floor: float
    pad_ratio: float
    pad_share_of_int8_peak: float
    trusted_memory_share: float
    tokens_per_s_unsplit: float
    tokens_per_s_split: float
    tokens_per_s_split_pads_inline: float
    seconds_per_token_unsplit_all_layers: float
    seconds_per_token_split_all_layers: float
    prefill_512_s_unsplit: float
    prefill_512_s_split: float
    pad_seconds_per_token: float
    pad_seconds_per_token_of_512: float
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
    rates: RateFigures
    memory: MemoryFigures
    simulated_rtts: list[RttFigures] = field(default_factory=list)
    batches: list[BatchFigures] = field(default_factory=list)
    against: list[AgainstFigures] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Footprint:
    """What the processes of a run needed: answers of `Runner.memory`, private bytes before anything was loaded, and the worker's."""

    split: dict[str, Any]
    interpreter: int
    plain: dict[str, Any]
    worker: int


def summarise(
    shape: str,
    layers: int,
    parameters: SlipConfig,
    tokens: int,
    series: Series,
    footprint: Footprint,
    memory: MemoryFigures,
    others: dict[str, dict[str, Any]],
) -> SlipBench:
    """What the rounds gave, without the round trips and batches.

    Args:
        layers: that were measured; tokens: per round.
        series: the answers of all rounds, by name; the other runtimes' by their names.
        others: what the other runtimes said when they were ready.
    """

    def seconds(name: str) -> float:
        return median_of(series[name])

    def middle(name: str, key: str) -> float:
        return statistics.median(float(result[key]) for result in series[name])

    config, whole = shape_config(shape, layers), shape_config(shape)
    growth = whole.num_hidden_layers / layers
    pad, pad_of_many, away = middle("pads", "per_row"), middle("many_pads", "per_row"), middle("ready", "seconds_worker")
    plain_all, split_all = seconds_all_layers(series["plain"], growth), seconds_all_layers(series["ready"], growth)
    prefill_ratio = seconds("prefill") / seconds("plain_prefill")
    rates = rate_figures(config, PREFILL, parameters.terms, series["rates"])
    per_layer, head = linear_parameters(config)
    heavier = (whole.num_hidden_layers * per_layer + head) / (layers * per_layer + head)
    return SlipBench(
        shape=shape,
        precision=parameters.precision,
        products=select_backend().name,
        layers=layers,
        layers_of_shape=whole.num_hidden_layers,
        rounds=len(series["plain"]),
        tokens_per_round=tokens,
        decode_ratio=seconds("plain") / seconds("ready"),
        decode_ratio_all_layers=plain_all / split_all,
        decode_ratio_pads_inline=seconds("plain") / seconds("inline"),
        prefill_ratio=prefill_ratio,
        prefill_floor=rates.floor,
        prefill_share_of_floor=rates.floor / prefill_ratio,
        pad_ratio=pad / away,
        pad_share_of_int8_peak=rates.pad_floor_seconds / pad_of_many,
        trusted_memory_share=footprint.split["parameters"] / footprint.plain["parameters"],
        tokens_per_s_unsplit=1 / seconds("plain"),
        tokens_per_s_split=1 / seconds("ready"),
        tokens_per_s_split_pads_inline=1 / seconds("inline"),
        seconds_per_token_unsplit_all_layers=plain_all,
        seconds_per_token_split_all_layers=split_all,
        prefill_512_s_unsplit=seconds("plain_prefill"),
        prefill_512_s_split=seconds("prefill"),
        pad_seconds_per_token=pad,
        pad_seconds_per_token_of_512=pad_of_many,
        worker_seconds_per_token=away,
        waiting_seconds_per_token=middle("ready", "seconds_waiting"),
        exchanges_per_token=middle("ready", "exchanges"),
        bytes_up_per_token=middle("ready", "bytes_up"),
        bytes_down_per_token=middle("ready", "bytes_down"),
        unsplit_parameter_bytes=footprint.plain["parameters"],
        trusted_model_bytes=footprint.split["parameters"],
        trusted_private_bytes=footprint.split["anonymous"] + footprint.split["mapped"],
        trusted_interpreter_bytes=footprint.interpreter,
        unsplit_private_bytes=footprint.plain["anonymous"],
        worker_private_bytes=footprint.worker,
        rates=rates,
        memory=memory,
        against=[against_figures(name, ready, series[name], seconds("ready"), split_all, heavier) for name, ready in others.items()],
    )


def seconds_all_layers(results: list[dict[str, Any]], growth: float) -> float:
    """Seconds per token with `growth` times as many layers: the median of each step's time besides, and its layers' times `growth`."""
    pairs = [pair for result in results for pair in zip(result["seconds"], result["seconds_layers"], strict=True)]
    return statistics.median(float(whole - layers + growth * layers) for whole, layers in pairs)
