from __future__ import annotations

import pytest

from cloven.bench import slip
from cloven.bench.slip import MEMORY_SHARE, bench_slip, layers_that_fit
from cloven.errors import BadInput

GB = 2**30


def with_memory(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(slip, "available_bytes", lambda: int(size))


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
def test_more_memory_more_layers_never_more_than_there_are(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (4 * GB, 8 * GB, 16 * GB, 32 * GB, 1000 * GB):
        with_memory(monkeypatch, size)
        found.append(layers_that_fit("llama-2-7b", precision))
    assert found == sorted(found) and found[0] < found[2] and found[-1] == 32


def test_two_terms_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 10 * GB)
    assert layers_that_fit("llama-2-7b", "int8x2") < layers_that_fit("llama-2-7b", "int8")


def test_what_is_chosen_does_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least the bf16 model and the int8 codes: 3 bytes per parameter of the chosen layers and the head."""
    for size in (4 * GB, 12 * GB):
        with_memory(monkeypatch, size)
        layers = layers_that_fit("llama-2-7b", "int8")
        assert 3 * (layers * 202e6 + 131e6) < MEMORY_SHARE * size


def test_not_even_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 1 * GB)
    with pytest.raises(BadInput, match="llama-2-7b: not even one layer fits in 70 % of the free memory"):
        layers_that_fit("llama-2-7b", "int8")


def test_unknown_shapes_and_precisions_are_refused_before_anything_is_written() -> None:
    steps: list[str] = []
    for shape, precision in (("gpt-5", "int8"), ("tiny", "int4")):
        with pytest.raises(BadInput):
            bench_slip(shape, lambda stage, done, total: steps.append(stage), precision=precision)
    assert steps == []
