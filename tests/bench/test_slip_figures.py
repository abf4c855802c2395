from __future__ import annotations

from typing import Any

import pytest

from cloven.bench.memory import memory_figures, unsplit_bytes
from cloven.bench.slip_figures import Footprint, Series, SlipBench, seconds_all_layers, summarise
from cloven.slip.config import SlipConfig
from cloven.zoo.shapes import linear_parameters, shape_config

READ: dict[str, Any] = {"anonymous": 900, "mapped": 400, "parameters": 450, "cache": 30, "layers": 200, "embeddings": 150, "factors": 180}


def decoded(seconds: float, layers: float) -> dict[str, Any]:
    traffic = {"exchanges": 9.0, "bytes_up": 70.0, "bytes_down": 80.0, "seconds_waiting": 0.01, "seconds_worker": 0.02}
    return {"seconds": [seconds] * 3, "seconds_layers": [layers] * 3, **traffic}


def series() -> Series:
    rates = {"bf16": 1.0, "int8": 0.5, "exact": 3.0, "int8_head": 0.1, "exact_head": 3.0}
    one: dict[str, dict[str, Any]] = {
        "plain": decoded(0.5, 0.4),
        "ready": decoded(0.25, 0.2),
        "inline": decoded(1.0, 0.9),
        "plain_prefill": {"seconds": [2.0]},
        "prefill": {"seconds": [5.0]},
        "pads": {"per_row": 0.06},
        "many_pads": {"per_row": 0.02},
        "rates": {name: [value] for name, value in rates.items()},
        "it": {"seconds": [0.125] * 3},
    }
    return {name: [value] * 2 for name, value in one.items()}


def summary(parameters: SlipConfig = SlipConfig()) -> SlipBench:  # noqa: B008
    memory = memory_figures("tiny", shape_config("tiny", 2), parameters, 3, 0, 800, READ)
    footprint = Footprint(READ, 800, {"parameters": 1000, "anonymous": 2000}, 50)
    return summarise("tiny", 2, parameters, 3, series(), footprint, memory, {"it": {"version": "1", "details": "d"}})


def test_speeds_and_ratios() -> None:
    result = summary()
    assert (result.rounds, result.layers, result.layers_of_shape, result.tokens_per_round) == (2, 2, 5, 3)
    assert (result.tokens_per_s_unsplit, result.tokens_per_s_split, result.tokens_per_s_split_pads_inline) == (2, 4, 1)
    assert (result.decode_ratio, result.decode_ratio_pads_inline, result.prefill_ratio) == (2, 0.5, 2.5)
    assert result.pad_ratio == pytest.approx(3) and result.exchanges_per_token == 9


def test_all_layers_are_extrapolated_by_the_time_in_the_layers() -> None:
    """5 layers of 2: the time in the layers 2.5 times, the time besides once."""
    result = summary()
    assert result.seconds_per_token_unsplit_all_layers == pytest.approx(0.1 + 2.5 * 0.4)
    assert result.seconds_per_token_split_all_layers == pytest.approx(0.05 + 2.5 * 0.2)
    assert result.decode_ratio_all_layers == pytest.approx(1.1 / 0.55)
    results = [{"seconds": [1.0, 3.0], "seconds_layers": [0.5, 1.0]}, {"seconds": [2.0], "seconds_layers": [1.0]}]
    assert seconds_all_layers(results, 1.0) == 2 and seconds_all_layers(results, 3.0) == 4
    with pytest.raises(ValueError, match="shorter"):
        seconds_all_layers([{"seconds": [1.0, 2.0], "seconds_layers": [0.5]}], 1.0)


@pytest.mark.parametrize(("precision", "terms"), [("int8", 1), ("int8x2", 2)])
def test_the_floor_and_the_pads(precision: str, terms: int) -> None:
    result = summary(SlipConfig(precision=precision))
    assert result.precision == precision
    assert result.prefill_floor == 2 * terms and result.prefill_share_of_floor == pytest.approx(2 * terms / 2.5)
    products = terms * (2 * 4 * 0.5 + 4 * 0.1) / 512  # two layers and the head, a row
    assert result.pad_share_of_int8_peak == pytest.approx(products / 0.02) and result.pad_seconds_per_token_of_512 == 0.02


def test_another_runtime_grows_with_its_weights() -> None:
    result = summary()
    (other,) = result.against
    assert other.tokens_per_s == 8 and other.decode_ratio == 0.5
    per_layer, head = linear_parameters(shape_config("tiny"))
    growth = (5 * per_layer + head) / (2 * per_layer + head)
    assert other.decode_ratio_all_layers == pytest.approx(growth * 0.125 / 0.55)


def test_memory_counts_weights_that_are_mapped() -> None:
    result = summary()
    assert result.trusted_memory_share == 0.45 and result.trusted_private_bytes == 1300
    assert (result.trusted_interpreter_bytes, result.worker_private_bytes, result.unsplit_private_bytes) == (800, 50, 2000)
    assert result.to_dict()["memory"]["unsplit_bytes"] == unsplit_bytes(shape_config("tiny", 2))
