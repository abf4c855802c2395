"""`cloven pads`: pads made in advance, on disk."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make SLIP's one-time pads in advance, and see how many are left.", no_args_is_help=True)


@app.command("fill")
def fill(
    trusted: Annotated[list[Path], typer.Argument(help="OUT/trusted of one or several SLIP bundles.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens the store shall last for, prompt and answer.")],
    store: Annotated[Path | None, typer.Option(help="The store's folder, for one bundle; default: OUT/pads.")] = None,
    exposed: Annotated[
        Path | None, typer.Option(envvar="CLOVEN_EXPOSED", help="The trusted side's own copy of OUT/exposed, for one bundle.")
    ] = None,
    engine: Annotated[str, typer.Option(help="inline, or pool or ray to fill several stores at a time.")] = "inline",
) -> None:
    """Fill pad stores until each lasts for so many tokens. Prints size and time first; refuses what the disk cannot hold.

    A store is bound to this machine and this folder: never copy it, and exclude it from backups.
    """
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.progress import progress_bars
    from cloven.engine.engine import select_engine
    from cloven.errors import BadInput
    from cloven.slip.pads import estimate, fill_job, fill_rounds
    from cloven.slip.pads import fill as fill_store

    forbid_core_dumps()
    if len(trusted) > 1 and (store is not None or exposed is not None):
        raise BadInput("--store and --exposed name one place: give one bundle with them")
    if len({path.resolve() for path in trusted}) < len(trusted):
        raise BadInput("a bundle is given twice")
    jobs = [fill_job(path, tokens, store, exposed) for path in trusted]
    runner = select_engine(engine, 0, 2**30)
    wanted = []
    for job in jobs:
        needs = estimate(job)
        if not needs.tokens:
            typer.echo(f"{job.store}: lasts for {tokens:,} tokens already")
            continue
        wanted.append(job)
        typer.echo(
            f"{job.store}: {needs.tokens:,} tokens, {_size(needs.bytes)} ({needs.bytes_per_token / 1e6:.2f} MB per token), "
            f"about {_duration(needs.seconds)}"
        )
    with progress_bars() as progress:
        if engine == "inline":
            for job in wanted:
                for made, total in fill_rounds(job):
                    progress(Path(job.store).parent.name, made, total)
        else:
            for done, _ in enumerate(runner.run(fill_store, wanted), start=1):
                progress("stores", done, len(wanted))
    for job in wanted:
        typer.echo(f"{job.store}: lasts for {tokens:,} tokens")


@app.command("status")
def status(
    trusted: Annotated[Path, typer.Argument(help="OUT/trusted of a SLIP bundle.")],
    store: Annotated[Path | None, typer.Option(help="The store's folder; default: OUT/pads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how many pads a store has made, used, lost and left. `reused` must be 0."""
    from rich.console import Console
    from rich.table import Table

    from cloven.bundle.trusted_manifest import TrustedManifest
    from cloven.masks.pad_store import PadStore
    from cloven.slip.pads import default_store

    manifest = TrustedManifest.read(trusted)
    pads = PadStore(store or default_store(trusted), manifest.bundle)
    with contextlib.closing(pads):
        groups = pads.status()
    totals = {name: sum(getattr(group, name) for group in groups) for name in ("filled", "used", "burnt", "reused")}
    tokens = min(group.left for group in groups)
    if as_json:
        typer.echo(json.dumps({**totals, "tokens_left": tokens, "groups": [asdict(group) for group in groups]}))
        return
    table = Table(title=f"pads of bundle {manifest.bundle}: {tokens:,} tokens left")
    for column in ("group", "filled", "used", "burnt", "reused", "left"):
        table.add_column(column, justify="right")
    for index, group in enumerate(groups):
        table.add_row(str(index), *(f"{value:,}" for value in asdict(group).values()))
    table.add_row("all", *(f"{totals[name]:,}" for name in ("filled", "used", "burnt", "reused")), "")
    console = Console()
    console.print(table)
    console.print("used: read for a call, or ahead of one. burnt: reserved by a process and not read (yet), lost if it was killed.")
    console.print("reused: must be 0.")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{max(1, round(seconds))} s"
