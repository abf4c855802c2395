from __future__ import annotations

from typing import Any

import pytest

from cloven.bench.matrix_rates import Products, layer_shapes, rate_figures
from cloven.bench.runner_process import RunnerProcess
from cloven.errors import RunError
from cloven.zoo.shapes import SHAPES, linear_parameters, shape_config

NAMES = {"bf16", "int8", "exact", "int8_head", "exact_head"}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrices_are_those_of_a_layer(shape: str) -> None:
    config = shape_config(shape)
    assert sum(rows * columns for rows, columns in layer_shapes(config)) == linear_parameters(config)[0]


@pytest.mark.parametrize("rows", [1, 20])
def test_every_product_is_timed(rows: int) -> None:
    products = Products(shape_config("tiny", 1))
    for answer in (products.products(rows), products.products(rows)):
        assert set(answer) == NAMES
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in answer.values())


def test_the_head_has_its_own_times() -> None:
    products = Products(shape_config("tiny", 1))
    assert products.head.shape == (1024, 256) and [tuple(w.shape) for w in products.layer] == layer_shapes(shape_config("tiny"))


def result(**times: float) -> list[dict[str, Any]]:
    return [{name: [seconds, seconds] for name, seconds in times.items()}]


def test_the_floor_is_four_plain_products() -> None:
    config = shape_config("tiny", 2)
    figures = rate_figures(config, 512, 1, result(bf16=1.0, int8=0.5, exact=9.0, int8_head=0.1, exact_head=9.0))
    assert figures.floor == 2
    assert figures.pad_floor_seconds == pytest.approx((2 * 2.0 + 0.4) / 512)  # two layers and the head
    operations = 2 * 512 * linear_parameters(config)[0]
    assert (figures.bf16_operations_per_s, figures.int8_operations_per_s) == (operations, operations / 0.5)
    assert figures.exact_operations_per_s == 4 * operations / 9


def test_the_back_end_sets_the_floor_where_it_is_faster() -> None:
    figures = rate_figures(shape_config("tiny", 2), 512, 1, result(bf16=1.0, int8=0.5, exact=1.5, int8_head=0.1, exact_head=0.3))
    assert figures.floor == 1.5 and figures.pad_floor_seconds == pytest.approx((2 * 1.5 + 0.3) / 512)


def test_two_terms_are_twice_the_work() -> None:
    times = result(bf16=1.0, int8=0.5, exact=1.5, int8_head=0.1, exact_head=0.3)
    one, two = (rate_figures(shape_config("tiny", 2), 512, terms, times) for terms in (1, 2))
    assert two.floor == 2 * one.floor and two.pad_floor_seconds == 2 * one.pad_floor_seconds


def test_in_a_process_of_its_own() -> None:
    with RunnerProcess("tiny", module="cloven.bench.matrix_rates") as runner:
        assert set(runner.ask("products", rows=8)) == NAMES
    with pytest.raises(RunError):
        RunnerProcess("gpt-5", module="cloven.bench.matrix_rates")
