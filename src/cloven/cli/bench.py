"""`cloven bench`: measurements, as commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloven.cli.bench_tables import print_memory, print_rows, print_slip

if TYPE_CHECKING:
    from cloven.bench.rounds import RoundsBench

app = typer.Typer(help="Measure: ratios from one interleaved run, medians.", no_args_is_help=True)


@app.callback()
def _schemes() -> None:
    pass


@app.command("slip")
def slip(
    shape: Annotated[str, typer.Option(help="tiny, llama-3.2-1b or llama-2-7b; weights are random.")] = "tiny",
    tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens per round.")] = 8,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default: as many as fit in 70 % of free memory.")] = None,
    precision: Annotated[str, typer.Option(help="int8 or int8x2.")] = "int8",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first, which warms up.")] = 5,
    simulate_rtt: Annotated[
        list[float] | None, typer.Option(metavar="MS", help="Also decode a few tokens over a link with this round trip; may be repeated.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(metavar="B", help="Also decode this many sequences at once; may be repeated.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="RUNTIME", help="Also decode the shape with llama.cpp or torchao, int8; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A model split by SLIP against the unsplit bf16 model: decode, prefill, pads, traffic, memory."""
    from cloven.bench.slip import bench_slip
    from cloven.cli.progress import progress_bars

    with progress_bars() as progress:
        more: dict[str, Any] = {"rtts_ms": simulate_rtt or (), "batches": batch or (), "against": against or ()}
        result = bench_slip(shape, progress, tokens=tokens, layers=layers, precision=precision, rounds=rounds, **more)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        print_slip(result)


@app.command("memory")
def memory(
    shape: Annotated[str, typer.Option(help="tiny, llama-3.2-1b or llama-2-7b; weights are random.")] = "tiny",
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default: all.")] = None,
    precision: Annotated[str, typer.Option(help="int8 or int8x2.")] = "int8",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode before memory is read.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How much private memory the trusted process of SLIP needs, pads in a store on disk, against the unsplit bf16 model."""
    from cloven.bench.memory import bench_memory
    from cloven.cli.progress import progress_bars

    with progress_bars() as progress:
        result = bench_memory(shape, progress, layers=layers, precision=precision, tokens=tokens)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        print_memory(result)


@app.command("prepare")
def prepare(
    shape: Annotated[str, typer.Option(help="tiny, llama-3.2-1b or llama-2-7b; weights are random.")] = "tiny",
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default: all.")] = None,
    precision: Annotated[str, typer.Option(help="int8 or int8x2.")] = "int8",
    engine: Annotated[str, typer.Option(help="inline, pool or ray.")] = "pool",
    folder: Annotated[Path | None, typer.Option(help="Where there is room: 3 bytes per parameter; default: the temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How long `cloven prepare slip` takes for a checkpoint of a shape, and how much memory its jobs need."""
    from cloven.bench.prepare import bench_prepare
    from cloven.cli.progress import progress_bars

    with progress_bars() as progress:
        result = bench_prepare(shape, progress, layers=layers, precision=precision, engine=engine, folder=folder)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    typer.echo(
        f"{result.shape}, {result.layers} of {result.layers_of_shape} layers, {result.parameters / 1e9:.2f} billion parameters in linears, "
        f"{result.precision}, {result.engine}: {result.seconds / 60:.1f} minutes"
    )
    typer.echo(
        f"private memory: {result.job_peak_bytes / 1e9:.2f} GB in the largest job (bound {result.job_bound_bytes / 1e9:.2f}), "
        f"{result.parent_peak_bytes / 1e9:.2f} GB in the command's own process, {result.total_peak_bytes / 1e9:.2f} GB together"
    )


@app.command("exchange")
def exchange(
    width: Annotated[int, typer.Option(min=64, help="Rows and columns of the matrix.")] = 4096,
    rows: Annotated[int, typer.Option(min=1, help="Rows of x: tokens.")] = 1,
    rounds: Annotated[int, typer.Option(min=5, help="Exchanges, after some that warm up.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where the time of one exchange between the trusted process and a worker goes, step by step."""
    from cloven.bench.exchange import bench_exchange
    from cloven.cli.progress import progress_bars

    with progress_bars() as progress:
        result = bench_exchange(width, rows, rounds, progress)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    lines = [(name, f"{microseconds:,.0f}") for name, microseconds in result.steps.items()]
    lines += [("the product at the worker", f"{result.worker:,.0f}"), ("of that step besides", f"{result.wire:,.0f}")]
    lines += [("all steps but the product", f"{result.overhead:,.0f}")]
    lines += [("such a product alone, in this process", f"{result.product:,.0f}")]
    lines += [("B (A x), while the worker works", f"{result.secret_part:,.0f}"), ("a whole call of the layer", f"{result.whole_call:,.0f}")]
    print_rows(
        f"one exchange, {result.rows} x {result.width}, {result.products}, medians of {result.rounds}", ("step", "microseconds"), lines
    )


@app.command("rounds")
def rounds(
    model: Annotated[str | None, typer.Argument(help="A model directory or a model on the Hub; default: the demo model.")] = None,
    assistant: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A small model that drafts; the demo model drafts for itself: an upper bound.")
    ] = None,
    prompt_lookup: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that prompt lookup drafts at a time.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per text.")] = 32,
    simulate_rtt: Annotated[
        list[float] | None, typer.Option(metavar="MS", help="Round trips to simulate besides none; may be repeated. Default: 1 and 10.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    precision: Annotated[str, typer.Option(help="int8 or int8x2.")] = "int8x2",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Exchanges per generated token with and without drafted tokens, and the speed with simulated round trips."""
    from cloven.cli.threads import let_threads_sleep

    let_threads_sleep()
    from cloven.bench.rounds import RTTS_MS, bench_rounds
    from cloven.cli.progress import progress_bars
    from cloven.model.quiet import quiet_transformers

    quiet_transformers()
    with progress_bars() as progress:
        result = bench_rounds(
            progress,
            model,
            assistant=assistant,
            prompt_lookup=prompt_lookup,
            tokens=tokens,
            rtts_ms=simulate_rtt or RTTS_MS,
            rounds=rounds,
            precision=precision,
            dtype=dtype,
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        _print_rounds(result)


def _print_rounds(result: RoundsBench) -> None:
    links = list(result.results[0].tokens_per_s)
    helper = f"assistant {result.assistant}" if result.assistant is not None else "no assistant"
    print_rows(
        f"SLIP, {result.precision}, {result.model}, {result.dtype}; prompt lookup of {result.prompt_lookup}; {helper}\n"
        "per generated token: exchanges, pads; tokens/s by simulated round trip",
        ("text", "drafts", "exchanges", "pads", "tokens", *(f"{link} ms" for link in links)),
        [
            (
                figures.text,
                figures.drafts,
                f"{figures.exchanges_per_token:.1f}",
                f"{figures.rows_per_token:.1f}",
                "same" if figures.tokens_identical else "OTHER",
                *(f"{figures.tokens_per_s[link]:.2f}" for link in links),
            )
            for figures in result.results
        ],
    )
    if result.assistant_is_the_model:
        typer.echo("The assistant is the model itself, unsplit: its figures are an upper bound for a small one.")


@app.command("kv-shield")
def kv_shield(
    shape: Annotated[str, typer.Option(help="tiny, llama-3.2-1b or llama-2-7b; weights are random.")] = "tiny",
    tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens per round.")] = 8,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default: all.")] = None,
    noise_dims: Annotated[int, typer.Option(help="Random dimensions per head, in session mode.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first, which warms up.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A model with a keyed cache against the stock bf16 model: decode, prefill, calls to the enclave, sealing."""
    from rich.console import Console
    from rich.table import Table

    from cloven.bench.kv_shield import bench_kv_shield
    from cloven.cli.progress import progress_bars
    from cloven.model.quiet import quiet_transformers

    quiet_transformers()
    with progress_bars() as progress:
        result = bench_kv_shield(shape, progress, tokens=tokens, layers=layers, noise_dims=noise_dims, rounds=rounds)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    table = Table(title=f"KV-Shield, {result.shape}, {result.layers} of {result.layers_of_shape} layers, bf16")
    for column in ("", "stock", "permute", "session"):
        table.add_column(column, justify="left" if not column else "right")
    speeds, prefills = result.tokens_per_s, result.prefill_512_s
    table.add_row("decode, tokens/s", f"{result.tokens_per_s_stock:.2f}", *(f"{speeds[mode]:.2f}" for mode in speeds))
    table.add_row("time of a decoded token / stock", "", f"{result.decode_slowdown_permute:.3f}", f"{result.decode_slowdown_session:.3f}")
    table.add_row("prefill of 512 tokens, s", f"{result.prefill_512_s_stock:.2f}", *(f"{prefills[mode]:.2f}" for mode in prefills))
    table.add_row("prefill / stock", "", f"{result.prefill_slowdown_permute:.3f}", f"{result.prefill_slowdown_session:.3f}")
    table.add_row("a call to the enclave, µs", "", *(f"{value:.0f}" for value in result.call_us.values()))
    table.add_row("bytes to and from the enclave, per token", "", *(f"{value:,.0f}" for value in result.bytes_per_token.values()))
    table.add_row("sealing, GB/s on one core", f"{result.seal_gb_per_s:.2f}", "", "")
    Console().print(table)


@app.command("private-lora")
def private_lora(
    shape: Annotated[str, typer.Option(help="chatglm2-6b, llama-2-7b or demo.")] = "chatglm2-6b",
    tokens: Annotated[int, typer.Option(min=1, help="Generated tokens per round.")] = 16,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers; default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first, which warms up.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The protocol of private LoRA without the base model: client, server, masks, bytes; beside homomorphic encryption."""
    from cloven.cli.threads import let_threads_sleep

    let_threads_sleep()
    from rich.console import Console
    from rich.table import Table

    from cloven.bench.private_lora import bench_private_lora
    from cloven.cli.progress import progress_bars
    from cloven.model.quiet import quiet_transformers

    quiet_transformers()
    with progress_bars() as progress:
        result = bench_private_lora(shape, progress, tokens=tokens, rounds=rounds, layers=layers)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    table = Table(title=f"Private LoRA, {result.shape}: {result.layers} layers, d = {result.columns}, r = {result.rank}")
    for column in ("", *result.backends):
        table.add_column(column, justify="left" if not column else "right")
    for name, field in (
        ("protocol, ms per generated token", "protocol_ms_per_token"),
        ("of it the server's product, ms", "server_ms_per_token"),
        ("masks, in the background, ms per token", "mask_ms_per_token"),
        ("protocol, ms per layer and token", "protocol_ms_per_layer"),
        ("bytes to the server, per layer and token", "bytes_up_per_layer"),
        ("bytes back", "bytes_down_per_layer"),
        ("prefill of 512 tokens, s, masks ready", "prefill_512_s"),
    ):
        values = [getattr(figures, field) for figures in result.backends.values()]
        table.add_row(name, *("" if value is None else f"{value:,.0f}" if "bytes" in field else f"{value:.3f}" for value in values))
    console = Console()
    console.print(table)
    console.print(f"Masks of the prefill: {result.prefill_512_masks_s:.2f} s, made before. The others: one layer, one process.")
    if result.not_installed:
        console.print(f"Not installed, so not measured: {', '.join(result.not_installed)}.")
