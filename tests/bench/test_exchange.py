from __future__ import annotations

import pytest

from cloven.bench.exchange import bench_exchange
from cloven.errors import BadInput


def test_the_steps_of_an_exchange() -> None:
    stages: list[str] = []
    result = bench_exchange(128, 2, 5, lambda stage, done, total: stages.append(stage))
    assert (result.width, result.rows, result.rounds) == (128, 2, 5) and "exchanges" in stages
    assert list(result.steps) == [
        "turned", "encoded", "pads taken", "masked", "sent, multiplied, received", "checked", "unmasked", "decoded",
        "turned back, added, rounded",
    ]  # fmt: skip
    figures = [*result.steps.values(), result.product, result.secret_part, result.whole_call]
    assert all(figure > 0 for figure in figures)
    assert result.overhead == pytest.approx(sum(result.steps.values()) - result.product)
    assert result.to_dict()["steps"] == result.steps


@pytest.mark.parametrize("width", [32, 100])
def test_a_width_that_does_not_fit(width: int) -> None:
    with pytest.raises(BadInput, match="give a multiple of 64"):
        bench_exchange(width, 1, 5, lambda *_: None)
