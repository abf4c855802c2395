from __future__ import annotations

import pytest

from cloven.bench.exchange import WITH_PRODUCT, bench_exchange
from cloven.errors import BadInput
from cloven.field.native.library import kernels_in_use

FUSED = ["pads taken", "turned, encoded, masked", WITH_PRODUCT, "checked, unmasked, decoded, turned back, added, rounded"]
ONE_BY_ONE = [
    "pads taken", "turned", "encoded", "masked", WITH_PRODUCT, "checked", "unmasked", "decoded", "turned back, added, rounded",
]  # fmt: skip


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_the_steps_of_an_exchange(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_KERNELS", kernels)
    stages: list[str] = []
    result = bench_exchange(128, 2, 5, lambda stage, done, total: stages.append(stage))
    assert (result.width, result.rows, result.rounds) == (128, 2, 5) and "exchanges" in stages
    assert list(result.steps) == (FUSED if kernels_in_use() is not None else ONE_BY_ONE)
    figures = [*result.steps.values(), result.worker, result.product, result.secret_part, result.whole_call]
    assert all(figure > 0 for figure in figures)
    besides = sum(time for name, time in result.steps.items() if name != WITH_PRODUCT)
    assert result.overhead == pytest.approx(besides + result.wire) and result.wire > 0
    assert result.to_dict()["steps"] == result.steps


@pytest.mark.parametrize("width", [32, 100])
def test_a_width_that_does_not_fit(width: int) -> None:
    with pytest.raises(BadInput, match="give a multiple of 64"):
        bench_exchange(width, 1, 5, lambda *_: None)
