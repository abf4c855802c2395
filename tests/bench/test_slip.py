from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloven.bench import slip
from cloven.bench.slip import MEMORY_SHARE, bench_slip, layers_that_fit
from cloven.bench.slip_figures import SlipBench
from cloven.errors import BadInput

GB = 2**30


def with_memory(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(slip, "available_bytes", lambda: int(size))


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
def test_more_memory_more_layers_never_more_than_there_are(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (5 * GB, 8 * GB, 16 * GB, 32 * GB, 1000 * GB):
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


def test_other_runtimes_need_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 20 * GB)
    every: tuple[tuple[str, ...], ...] = ((), ("llama.cpp",), ("llama.cpp", "torchao"))
    alone, beside_one, beside_two = (layers_that_fit("llama-2-7b", "int8", names) for names in every)
    assert alone > beside_one > beside_two >= 1
    assert (3 + 34 / 32 + 3) * (beside_two * 202e6 + 131e6) < MEMORY_SHARE * 20 * GB


def test_runtimes_that_are_not_there_are_refused_before_anything_is_written() -> None:
    steps: list[str] = []
    with pytest.raises(BadInput, match=r"choose one of llama\.cpp, torchao"):
        bench_slip("tiny", lambda stage, done, total: steps.append(stage), against=["vllm"])
    assert steps == []


class FakeProcess:
    """A process that answers as if everything took half a second; what it is asked is written down."""

    def __init__(self, name: str, asked: list[tuple[str, str]]) -> None:
        self.name, self.asked, self.stopped = name, asked, False
        self.before, self.pid, self.address = 1, 1, "ipc://nowhere"
        self.ready = {"version": f"{name} 1", "details": ""}

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped = True

    def ask(self, op: str, tokens: int = 1, rows: int = 1) -> dict[str, Any]:
        self.asked.append((self.name, op))
        if op == "products":
            return {name: [0.5, 0.5] for name in ("bf16", "int8", "exact", "int8_head", "exact_head")}
        if op == "memory":
            return {"anonymous": 10, "parameters": 20, "mapped": 5}
        if op == "pads":
            return {"seconds": 0.5}
        traffic = dict.fromkeys(("exchanges", "bytes_up", "bytes_down", "seconds_waiting", "seconds_worker"), 1.0)
        return {"seconds": [0.5] * tokens, "seconds_layers": [0.25] * tokens, **traffic}


NAMES = ["llama.cpp", "torchao"]


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    """The processes of other runtimes, none of which is needed; the list fills as they start."""
    started: list[FakeProcess] = []
    asked: list[tuple[str, str]] = []

    def start(name: str, shape: str, layers: int, tokens: int, folder: Path) -> FakeProcess:
        assert (shape, layers, tokens) == ("tiny", 1, 2) and folder.is_dir()
        started.append(FakeProcess(name, asked))
        return started[-1]

    monkeypatch.setattr(slip, "check_runtimes", tuple)
    monkeypatch.setattr(slip, "start_runtime", start)
    return started


def check_run(result: SlipBench, runtimes: list[FakeProcess], rounds: int) -> None:
    assert all(runtime.stopped for runtime in runtimes)
    assert [one for one in runtimes[0].asked if one[0] in NAMES] == [(name, "decode") for _ in range(rounds + 1) for name in NAMES]
    assert [other.name for other in result.against] == NAMES and result.against[0].tokens_per_s == 2
    assert result.against[0].decode_ratio == pytest.approx(0.5 * result.tokens_per_s_split)
    assert result.prefill_floor > 0 and result.prefill_share_of_floor == pytest.approx(result.prefill_floor / result.prefill_ratio)
    assert result.pad_share_of_int8_peak > 0 and result.rates.floor == result.prefill_floor
    assert result.seconds_per_token_split_all_layers > 1 / result.tokens_per_s_split
    assert (result.rounds, result.layers) == (rounds, 1)


@pytest.mark.long
def test_a_run_with_other_runtimes_beside(runtimes: list[FakeProcess]) -> None:
    """Real processes but for the runtimes: one layer, one round after the one that warms up."""
    stages: list[str] = []
    result = bench_slip("tiny", lambda stage, *_: stages.append(stage), tokens=2, layers=1, rounds=1, against=NAMES)
    check_run(result, runtimes, 1)
    assert result.memory.layers == 1 and result.memory.model_bytes == result.trusted_model_bytes
    assert result.memory.unsplit_bytes == result.unsplit_parameter_bytes
    assert "loading llama.cpp" in stages and stages[-1] == "measuring memory"


def test_a_run_in_short(runtimes: list[FakeProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is real: who is asked what, in which order, and that all have ended before memory is measured."""
    asked: list[tuple[str, str]] = []
    started: list[FakeProcess] = []

    def process(*arguments: Any, module: str = "") -> FakeProcess:
        started.append(FakeProcess("rates" if module else str(arguments[0]), asked))
        return started[-1]

    def memory(*_: object) -> None:
        assert [(one.name, one.stopped) for one in started] == [("worker", False), ("rates", True), ("split", True), ("plain", True)]
        assert all(runtime.stopped for runtime in runtimes)

    monkeypatch.setattr(slip, "write_random_bundle", lambda *_: SimpleNamespace(exposed="worker", trusted="trusted"))
    monkeypatch.setattr(slip, "WorkerProcess", process)
    monkeypatch.setattr(slip, "RunnerProcess", process)
    monkeypatch.setattr(slip, "measured_memory", memory)
    result = bench_slip("tiny", lambda *_: None, tokens=2, layers=1, rounds=2, against=NAMES)
    check_run(result, runtimes, 2)
    decode, prefill = [("split", "pads"), ("split", "decode"), ("split", "drop_pads"), ("split", "decode")], ("split", "prefill")
    pads = ("split", "pads"), prefill, ("split", "drop_pads")
    one = [("plain", "decode"), *decode, ("plain", "prefill"), *pads, ("rates", "products")]
    assert asked == [*one * 3, ("split", "memory"), ("plain", "memory")]
    assert result.decode_ratio == 1 and result.trusted_private_bytes == 15


def test_unknown_shapes_and_precisions_are_refused_before_anything_is_written() -> None:
    steps: list[str] = []
    for shape, precision in (("gpt-5", "int8"), ("tiny", "int4")):
        with pytest.raises(BadInput):
            bench_slip(shape, lambda stage, done, total: steps.append(stage), precision=precision)
    assert steps == []
