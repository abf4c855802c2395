"""Tables of `cloven bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloven.bench.memory import MemoryFigures
    from cloven.bench.slip_figures import SlipBench


def print_slip(result: SlipBench) -> None:
    """Everything that `cloven bench slip` measured."""
    from rich.console import Console
    from rich.table import Table

    layers = f"{result.layers} of {result.layers_of_shape} layers"
    table = Table(title=f"SLIP, {result.precision}, {result.shape}, {layers}; unsplit: bf16; {result.products}")
    for column in ("", "unsplit", "split", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "decode, tokens/s, pads ready",
        f"{result.tokens_per_s_unsplit:.2f}",
        f"{result.tokens_per_s_split:.2f}",
        f"{result.decode_ratio:.2f}",
    )
    table.add_row(
        "decode, tokens/s, pads inline", "", f"{result.tokens_per_s_split_pads_inline:.2f}", f"{result.decode_ratio_pads_inline:.2f}"
    )
    if result.layers < result.layers_of_shape:
        unsplit, split = result.seconds_per_token_unsplit_all_layers, result.seconds_per_token_split_all_layers
        name = f"decode, extrapolated to {result.layers_of_shape} layers"
        table.add_row(name, f"{1 / unsplit:.2f}", f"{1 / split:.2f}", f"{result.decode_ratio_all_layers:.2f}")
    table.add_row(
        "prefill of 512 tokens, s, pads ready",
        f"{result.prefill_512_s_unsplit:.2f}",
        f"{result.prefill_512_s_split:.2f}",
        f"{result.prefill_ratio:.2f}",
    )
    table.add_row("four int8 products in the time of a bf16 one: the floor", "", "", f"{result.prefill_floor:.2f}")
    table.add_row("floor / prefill ratio", "", "", f"{result.prefill_share_of_floor:.2f}")
    table.add_row("pads, speed / that of an int8 product", "", "", f"{result.pad_share_of_int8_peak:.2f}")
    table.add_row(
        "pads / worker, ms per token",
        "",
        f"{1e3 * result.pad_seconds_per_token:.1f} / {1e3 * result.worker_seconds_per_token:.1f}",
        f"{result.pad_ratio:.2f}",
    )
    table.add_row("exchanges per token", "", f"{result.exchanges_per_token:.0f}", "")
    table.add_row("bytes up / down per token", "", f"{result.bytes_up_per_token:,.0f} / {result.bytes_down_per_token:,.0f}", "")
    table.add_row(
        "model in the process, MB",
        f"{result.unsplit_parameter_bytes / 1e6:,.0f}",
        f"{result.trusted_model_bytes / 1e6:,.0f}",
        f"{result.trusted_memory_share:.3f}",
    )
    table.add_row(
        "private memory, MB (worker: " + f"{result.worker_private_bytes / 1e6:,.0f})",
        f"{result.unsplit_private_bytes / 1e6:,.0f}",
        f"{result.trusted_private_bytes / 1e6:,.0f}",
        "",
    )
    Console().print(table)
    print_memory(result.memory)
    if result.against:
        print_rows(
            "decode against int8 models without protection, tokens/s; split: pads ready",
            ("runtime", "it", "split / it", "all layers", "version", "ways tried before"),
            [
                (
                    other.name,
                    f"{other.tokens_per_s:.2f}",
                    f"{other.decode_ratio:.2f}",
                    f"{other.decode_ratio_all_layers:.2f}",
                    other.version,
                    ", ".join(f"{way}: {speed:.2f}" for way, speed in other.ways.items()),
                )
                for other in result.against
            ],
        )
    if result.simulated_rtts:
        print_rows(
            "decode over a simulated link, pads ready",
            ("round trip, ms", "ms per token", "without, ms", "exchanges × RTT, ms", "measured, ms", "measured / expected"),
            [
                (
                    f"{link.rtt_ms:g}",
                    f"{1e3 * link.seconds_per_token:.1f}",
                    f"{1e3 * link.seconds_per_token_without:.1f}",
                    f"{1e3 * link.rtt_seconds_expected:.1f}",
                    f"{1e3 * link.rtt_seconds_measured:.1f}",
                    f"{link.rtt_ratio:.3f}",
                )
                for link in result.simulated_rtts
            ],
        )
    if result.batches:
        print_rows(
            "decode of a batch, pads ready",
            (
                "sequences",
                "unsplit, s per step",
                "split, s per step",
                "unsplit, tokens/s",
                "split, tokens/s",
                "ratio",
                "exchanges per token",
            ),
            [
                (
                    str(figures.batch),
                    f"{figures.step_seconds_unsplit:.3f}",
                    f"{figures.step_seconds_split:.3f}",
                    f"{figures.tokens_per_s_unsplit:.2f}",
                    f"{figures.tokens_per_s_split:.2f}",
                    f"{figures.decode_ratio:.2f}",
                    f"{figures.exchanges_per_token:.1f}",
                )
                for figures in result.batches
            ],
        )


def print_memory(result: MemoryFigures) -> None:
    """What the trusted process's private memory is made of."""
    parts = (
        ("model: factors", result.factor_bytes),
        ("model: embedding", result.embedding_bytes),
        ("model: norms, scales, permutations", result.model_bytes - result.factor_bytes - result.embedding_bytes),
        ("rest: checks, pads read ahead, buffers", result.rest_bytes),
        ("model and rest", result.model_bytes + result.rest_bytes),
        ("besides: KV cache", result.kv_cache_bytes),
        ("besides: interpreter and libraries", result.interpreter_bytes),
        ("besides, not private: pads, mapped from disk", result.pads_mapped_bytes),
        ("the unsplit model, bf16", result.unsplit_bytes),
    )
    share = f"model and rest / unsplit: {100 * result.private_share:.1f} %"
    if result.layers < result.layers_of_shape:
        share += f"; extrapolated to {result.layers_of_shape} layers: {100 * result.private_share_all_layers:.1f} % at most"
    layers = f"{result.layers} of {result.layers_of_shape} layers"
    print_rows(
        f"the trusted process's private memory, pads on disk, {result.shape}, {layers}\n{share}",
        ("", "MB"),
        [(name, f"{size / 1e6:,.1f}") for name, size in parts],
    )


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a title."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
