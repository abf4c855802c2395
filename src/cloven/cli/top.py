"""`cloven top`: what the processes of a running system do, from their metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from cloven.metrics.rates import Activity

_NONE = "–"
_STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_COLUMNS = (
    ("exch/s", "exchanges"),
    ("rows/s", "rows"),
    ("tok/s", "tokens"),
    ("in B/s", "bytes_in"),
    ("out B/s", "bytes_out"),
    ("busy", "busy"),
    ("waits", "waiting_seconds"),
    ("cpu", "cpu"),
    ("queue", "queue"),
    ("conn", "connections"),
    ("refused", "refused"),
    ("failed", "failures"),
    ("pads", "pads"),
    ("ledger", "ledger"),
    ("mem", "memory"),
)
_SHARES = ("busy", "waiting_seconds", "cpu")


def top(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="http://HOST:PORT of every process (its --metrics-port).")],
    interval: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds between two looks: rates are over that time.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print one table, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look twice, print JSON, and end.")] = False,
) -> None:
    """Show what workers, enclaves, adapter servers and endpoints do, live, until Ctrl-C. A process that is away is shown as away."""
    import contextlib
    import dataclasses
    import json
    import time

    from rich.console import Console
    from rich.live import Live

    from cloven.cli.monitoring import require_installed

    require_installed("cloven top", "prometheus_client", "httpx")
    from cloven.metrics.scrape import metrics_url
    from cloven.metrics.watch import Watch

    addresses = list(dict.fromkeys(metrics_url(url) for url in urls))
    console = Console()
    with Watch(addresses) as watch:
        rows = watch.look()
        if once or as_json:
            time.sleep(interval)
            rows = watch.look()
            if as_json:
                typer.echo(json.dumps([dataclasses.asdict(row) | {"up": row.up} for row in rows]))
            else:
                console.print(table(rows))
            return
        live = Live(table(rows), console=console, auto_refresh=False, screen=console.is_terminal)
        with contextlib.suppress(KeyboardInterrupt), live:
            while True:
                time.sleep(interval)
                live.update(table(watch.look()), refresh=True)


def table(rows: list[Activity]) -> Table:
    """The processes as a table for the terminal, without columns that are empty."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title="cloven")
    made.add_column("process")
    made.add_column("state")
    shown = [(title, name) for title, name in _COLUMNS if any(getattr(row, name) is not None for row in rows)]
    for title, _ in shown:
        made.add_column(title, justify="right")
    for row in rows:
        cells = [_cell(name, getattr(row, name)) for _, name in shown]
        state = f"[green]{row.role or 'up'}[/]" if row.up else f"[red]{escape(row.status)}[/]"
        made.add_row(escape(row.url.removesuffix("/metrics")), state, *cells)
    return made


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return _NONE
    if name in _SHARES:
        return f"{value:.0%}"
    for size, unit in _STEPS:
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"
