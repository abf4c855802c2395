"""Decoding over a simulated link, and decoding a batch: parts of `cloven bench slip` that run when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloven.bench.runner import CONTEXT
from cloven.bench.runner_process import RunnerProcess, median_of
from cloven.errors import BadInput
from cloven.wire.channel import checked_rtt

MOST_SEQUENCES = 32  # in a batch: with CONTEXT and as many new tokens, no more pads than the prefill of 512 needs
RTT_TOKENS = 4


@dataclass(frozen=True)
class RttFigures:
    """Decoding with a simulated round trip: medians per token, in seconds, against steps without it in between.

    `rtt_seconds_expected` is exchanges × round trip, `rtt_seconds_measured` the difference of the times, `rtt_ratio` measured / expected.
    """

    rtt_ms: float
    seconds_per_token: float
    seconds_per_token_without: float
    tokens_per_s: float
    exchanges_per_token: float
    rtt_seconds_expected: float
    rtt_seconds_measured: float
    rtt_ratio: float


@dataclass(frozen=True)
class BatchFigures:
    """Decoding a batch of sequences, pads ready: medians. A step makes one token for each; `decode_ratio` is of speeds, as for one."""

    batch: int
    step_seconds_unsplit: float
    step_seconds_split: float
    tokens_per_s_unsplit: float
    tokens_per_s_split: float
    decode_ratio: float
    exchanges_per_step: float
    exchanges_per_token: float


def check_measurements(rtts_ms: Sequence[float], batches: Sequence[int] = ()) -> None:
    """Refuse what cannot be measured.

    Raises:
        BadInput: a round trip that is not more than 0 and less than a minute, or an impossible batch.
    """
    for rtt in rtts_ms:
        if not checked_rtt(rtt / 1000):
            raise BadInput("simulated round trip 0: every run measures that anyway")
    for batch in batches:
        if not 1 <= batch <= MOST_SEQUENCES:
            raise BadInput(f"a batch of {batch}: give 1 to {MOST_SEQUENCES} sequences")


def rtts_decoded(split: RunnerProcess, tokens: int, rtts_ms: Sequence[float]) -> dict[str, dict[str, Any]]:
    """One round of decoding a few tokens with each simulated round trip (ms): the answers, by name."""
    result = {}
    tokens = min(tokens, RTT_TOKENS)
    for rtt in rtts_ms:
        split.ask("pads", rows=2 * tokens + CONTEXT)
        result[f"rtt {rtt}"] = split.ask("decode_rtt", tokens=tokens, rtt=rtt / 1000)
        split.ask("drop_pads")
    return result


def batches_decoded(plain: RunnerProcess, split: RunnerProcess, tokens: int, batches: Sequence[int]) -> dict[str, dict[str, Any]]:
    """One round of decoding each batch, unsplit and split, pads ready: the answers, by name."""
    result = {}
    tokens = min(tokens, CONTEXT)
    for batch in batches:
        result[f"plain batch {batch}"] = plain.ask("decode", tokens=tokens, batch=batch)
        split.ask("pads", rows=batch * (tokens + CONTEXT))
        result[f"batch {batch}"] = split.ask("decode", tokens=tokens, batch=batch)
        split.ask("drop_pads")
    return result


def rtt_figures(rtt_ms: float, results: list[dict[str, Any]]) -> RttFigures:
    """What the rounds with a round trip gave."""
    with_it, without, exchanges = median_of(results), median_of(results, "without"), float(results[0]["exchanges"])
    expected = exchanges * rtt_ms / 1000
    return RttFigures(
        rtt_ms=rtt_ms,
        seconds_per_token=with_it,
        seconds_per_token_without=without,
        tokens_per_s=1 / with_it,
        exchanges_per_token=exchanges,
        rtt_seconds_expected=expected,
        rtt_seconds_measured=with_it - without,
        rtt_ratio=(with_it - without) / expected,
    )


def batch_figures(batch: int, plain: list[dict[str, Any]], split: list[dict[str, Any]]) -> BatchFigures:
    """What the rounds with a batch gave."""
    unsplit_seconds, split_seconds, exchanges = median_of(plain), median_of(split), float(split[0]["exchanges"])
    return BatchFigures(
        batch=batch,
        step_seconds_unsplit=unsplit_seconds,
        step_seconds_split=split_seconds,
        tokens_per_s_unsplit=batch / unsplit_seconds,
        tokens_per_s_split=batch / split_seconds,
        decode_ratio=unsplit_seconds / split_seconds,
        exchanges_per_step=exchanges,
        exchanges_per_token=exchanges / batch,
    )
