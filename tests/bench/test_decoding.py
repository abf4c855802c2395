from __future__ import annotations

from typing import Any

import pytest

from cloven.bench import runner as runner_module
from cloven.bench.decoding import MOST_SEQUENCES, batch_figures, batches_decoded, check_measurements, rtt_figures, rtts_decoded
from cloven.bench.runner import CONTEXT, Runner
from cloven.bench.runner_process import RunnerProcess, median_of
from cloven.bench.slip import PREFILL
from cloven.errors import BadInput
from tests.split_models import attached, tiny, tiny_bundle


class InThisProcess:
    """A runner that is asked as a process of its own would be."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.asked: list[str] = []

    def ask(self, op: str, **arguments: float) -> dict[str, Any]:
        assert op in runner_module.OPERATIONS
        self.asked.append(op)
        result: dict[str, Any] = getattr(self.runner, op)(**arguments)
        return result


def as_process(runner: InThisProcess) -> RunnerProcess:
    return runner  # type: ignore[return-value]


def test_a_simulated_round_trip_costs_what_it_says() -> None:
    """A real worker: the time of decoding grows by exchanges × round trip, within 10 %."""
    with attached(tiny_bundle("llama"), look_ahead=0) as (model, session):
        split = InThisProcess(Runner(model, session))
        series = [rtts_decoded(as_process(split), 1, (100.0,)) for _ in range(2)]
        figures = rtt_figures(100.0, [one["rtt 100.0"] for one in series])
        assert session.channel.simulated_rtt == 0
    assert figures.exchanges_per_token == 9 and figures.rtt_seconds_expected == pytest.approx(0.9)
    assert figures.rtt_ratio == pytest.approx(1, abs=0.1)
    assert figures.rtt_seconds_measured == pytest.approx(figures.seconds_per_token - figures.seconds_per_token_without)
    assert split.asked == ["pads", "decode_rtt", "drop_pads"] * 2


def test_a_batch_shares_its_exchanges() -> None:
    with attached(tiny_bundle("llama"), look_ahead=0) as (model, session):
        split, plain = InThisProcess(Runner(model, session)), InThisProcess(Runner(tiny("llama"), None))
        one = batches_decoded(as_process(plain), as_process(split), 2, (1, 4))
        assert sum(layer.rows for layer in session.statistics().values()) == 2 * 4 * 9  # of the last: 2 steps of 4 rows, 9 groups
    for batch in (1, 4):
        figures = batch_figures(batch, [one[f"plain batch {batch}"]], [one[f"batch {batch}"]])
        assert figures.exchanges_per_step == 9 and figures.exchanges_per_token == 9 / batch
        assert figures.tokens_per_s_split == pytest.approx(batch / figures.step_seconds_split)
        assert figures.decode_ratio == pytest.approx(figures.tokens_per_s_split / figures.tokens_per_s_unsplit)


def test_the_pads_of_a_batch_are_no_more_than_those_of_the_prefill() -> None:
    assert MOST_SEQUENCES * 2 * CONTEXT <= PREFILL


@pytest.mark.parametrize("rtt", [0.0, -1.0, float("nan"), 60_000.0])
def test_impossible_round_trips(rtt: float) -> None:
    with pytest.raises(BadInput, match="simulated round trip"):
        check_measurements([1.0, rtt])


@pytest.mark.parametrize("batch", [0, -1, MOST_SEQUENCES + 1])
def test_impossible_batches(batch: int) -> None:
    with pytest.raises(BadInput, match=f"a batch of {batch}: give 1 to 32"):
        check_measurements([], [4, batch])


def test_medians_are_over_all_answers() -> None:
    assert median_of([{"seconds": [1, 2]}, {"seconds": [3]}]) == 2
    assert median_of([{"seconds": [], "without": [5.0]}], "without") == 5


def test_what_a_runner_can_be_asked() -> None:
    assert all(callable(getattr(Runner, name)) for name in runner_module.OPERATIONS)
