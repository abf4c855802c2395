"""`cloven demo`: see it work, on the model that ships with the package; needs no network."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cloven.demo.slip import Progress, SlipDemo


def demo(
    scheme: Annotated[str, typer.Argument(help="slip, kv-shield or private-lora.")] = "slip",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    prompts: Annotated[int, typer.Option(min=1, max=20, help="How many of the 20 prompts.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, max=256, help="New tokens per prompt.")] = 64,
) -> None:
    """See a scheme work on the shipped model, in two processes, beside the unprotected one; and what an adversary gets."""
    from cloven.cli.threads import let_threads_sleep

    let_threads_sleep()
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.progress import progress_bars
    from cloven.errors import BadInput
    from cloven.model.quiet import quiet_transformers

    shows = {"slip": _slip, "kv-shield": _kv_shield, "private-lora": _private_lora}
    if scheme not in shows:
        raise BadInput(f"there is no demo of {scheme!r}; choose slip, kv-shield or private-lora")
    forbid_core_dumps()
    quiet_transformers()
    with progress_bars() as progress:
        good = shows[scheme](progress, prompts, tokens, as_json)
    if not good:
        raise typer.Exit(1)


def _slip(progress: Progress, prompts: int, tokens: int, as_json: bool) -> bool:
    from cloven.demo.slip import run_slip_demo

    result = run_slip_demo(progress, prompts, tokens)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        _print(result)
    return result.tokens_identical == result.prompts and result.bit_exact


def _kv_shield(progress: Progress, prompts: int, tokens: int, as_json: bool) -> bool:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cloven.cli.audit import print_table
    from cloven.demo.kv_shield import run_kv_demo

    result = run_kv_demo(progress, prompts, tokens)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        console = Console()
        console.print(f"[bold]{escape(result.example_prompt)}[/bold]{escape(result.example_text)}\n", highlight=False)
        table = Table(title="KV-Shield on the demo model")
        for column in ("", "unprotected", *result.text_identical):
            table.add_column(column, justify="right" if column else "left")
        table.add_row(f"texts of {tokens} tokens identical", "", *(f"{n} of {result.prompts}" for n in result.text_identical.values()))
        table.add_row("tokens/s", f"{result.tokens_per_s_plain:.0f}", *(f"{speed:.0f}" for speed in result.tokens_per_s.values()))
        console.print(table)
        print_table(result.attacks)
    return all(count == result.prompts for count in result.text_identical.values())


def _private_lora(progress: Progress, prompts: int, tokens: int, as_json: bool) -> bool:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cloven.demo.private_lora import run_lora_demo

    result = run_lora_demo(progress, prompts, tokens)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return _mostly_identical(result.tokens_identical_to_peft, result.prompts)
    console = Console()
    console.print(f"[bold]{escape(result.example_prompt)}[/bold]{escape(result.example_text)}\n", highlight=False)
    table = Table(title="Private LoRA on the demo model and the demo adapter (float32)")
    for column in ("what", "base", "private", "PEFT"):
        table.add_column(column, justify="left" if column == "what" else "right")
    same, other = result.tokens_identical_to_peft, result.prompts - result.tokens_different_from_base
    table.add_row(f"greedy texts of {tokens} tokens identical to PEFT's", f"{other} of {result.prompts}", f"{same} of {result.prompts}", "")
    table.add_row(
        f"perplexity ({result.perplexity_tokens:,} tokens sampled from PEFT's model)",
        *(f"{value:.3f}" for value in (result.perplexity_base, result.perplexity_private, result.perplexity_peft)),
    )
    table.add_row("tokens/s", "", f"{result.tokens_per_s_private:.1f}", f"{result.tokens_per_s_peft:.1f}")
    for bits, error in result.error_by_bits.items():
        table.add_row(f"relative error of the logits, answers of {bits} bits", "", f"{error:.1e}", "")
    console.print(table)
    cost = Table(title="What it cost, per token", show_header=False)
    cost.add_row("queries to the adapter server", f"{result.queries_per_token}")
    cost.add_row("bytes to the server / back", f"{result.bytes_up_per_token:,.0f} / {result.bytes_down_per_token:,.0f}")
    cost.add_row("making masks, in the background", f"{result.mask_ms_per_token:.2f} ms")
    cost.add_row("the ledger: rows used of the budget, per matrix", f"{result.queries_used:,} of {result.budget:,}")
    console.print(cost)
    console.print("The server saw LWE samples. What its answers give away of the adapter is metered by the ledger, not hidden.")
    return _mostly_identical(same, result.prompts)


def _mostly_identical(same: int, prompts: int) -> bool:
    """19 of 20: answers are rounded to 16 bits, and a near tie may fall the other way."""
    return same >= prompts - prompts // 20


def _print(result: SlipDemo) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{escape(result.example_prompt)}[/bold]{escape(result.example_text)}\n", highlight=False)
    table = Table(title="SLIP on the demo model (float32 in the trusted process)", show_header=True)
    table.add_column("what")
    table.add_column("unsplit", justify="right")
    table.add_column("split, int8", justify="right")
    table.add_column("split, int8x2", justify="right")
    table.add_row(
        f"greedy texts identical to unsplit ({result.new_tokens} tokens)",
        "",
        f"{result.tokens_identical_int8} of {result.prompts}",
        f"{result.tokens_identical} of {result.prompts}",
    )
    table.add_row(
        f"perplexity ({result.perplexity_tokens:,} tokens sampled from the unsplit model)",
        f"{result.perplexity_original:.4f}",
        f"{result.perplexity_protected:.4f}",
        f"{result.perplexity_protected_int8x2:.4f}",
    )
    table.add_row("tokens/s", f"{result.tokens_per_s_plain:.1f}", "", f"{result.tokens_per_s_protected:.1f}")
    table.add_row("integer products through both processes exact, bit for bit", "", *2 * ["yes" if result.bit_exact else "NO"])
    console.print(table)
    cost = Table(title="What it cost, per generated token (int8x2)", show_header=False)
    cost.add_row("exchanges with the worker", f"{result.exchanges_per_token:.1f}")
    cost.add_row("bytes to the worker / back", f"{result.bytes_up_per_token:,.0f} / {result.bytes_down_per_token:,.0f}")
    cost.add_row("making pads, in the background", f"{1000 * result.pad_seconds_per_token:.2f} ms")
    cost.add_row("parameters kept secret", f"{result.secret_fraction:.2%}")
    console.print(cost)
    saw = Table(title=f"What the worker (process {result.worker_pid}) has; the trusted process is {result.trusted_pid}", show_header=False)
    saw.add_row("perplexity of its half alone, int8, scrambled", f"{result.perplexity_exposed_only:,.1f}")
    saw.add_row("the same if it also knew the scramble", f"{result.perplexity_exposed_unscrambled:,.1f}")
    saw.add_row("vectors it received (int8x2)", f"{result.worker_saw.vectors:,}")
    saw.add_row("their low bytes: chi-square p (uniform: not near 0)", f"{result.worker_saw.chi_square_p:.3f}")
    saw.add_row("one of them begins", " ".join(map(str, result.worker_saw.example[:5])))
    console.print(saw)
