"""`cloven top`: what the processes of a running system do, from their metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from cloven.metrics.rates import Activity

_NONE = "–"
_STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_COLUMNS = (  # a narrow terminal shows the first ones
    ("exch/s", "exchanges"),
    ("tok/s", "tokens"),
    ("busy", "busy"),
    ("in B/s", "bytes_in"),
    ("out B/s", "bytes_out"),
    ("failed", "failures"),
    ("refused", "refused"),
    ("pads", "pads"),
    ("ledger", "ledger"),
    ("queue", "queue"),
    ("conn", "connections"),
    ("waits", "waiting_seconds"),
    ("rows/s", "rows"),
    ("cpu", "cpu"),
    ("mem", "memory"),
)
_SIDES, _BETWEEN = 2, 3  # characters left and right of the table's columns together, and between two
_PIPE_WIDTH = 1000
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
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    with Watch(addresses) as watch, contextlib.suppress(KeyboardInterrupt):
        rows = watch.look()
        if console.is_terminal and not (once or as_json):
            with Live(table(rows, console.width), console=console, auto_refresh=False, screen=True) as live:
                while True:
                    time.sleep(interval)
                    live.update(table(watch.look(), console.width), refresh=True)
        while True:
            time.sleep(interval)
            rows = watch.look()
            if as_json:
                typer.echo(json.dumps([dataclasses.asdict(row) | {"up": row.up} for row in rows]))
            else:
                console.print(table(rows, console.width))
            if once or as_json:
                return


def table(rows: list[Activity], width: int) -> Table:
    """The processes as a table, without columns that are empty, or for which `width` characters have no room."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    processes = [row.url.removeprefix("http://").removesuffix("/metrics") for row in rows]
    states = [(row.role or "up") if row.up else row.status for row in rows]
    made.add_column("process", overflow="fold")
    made.add_column("state", overflow="fold")
    left = width - _SIDES - max(map(len, processes)) - _BETWEEN - max(map(len, states))
    columns: list[list[str]] = []
    for title, name in _COLUMNS:
        cells = [_cell(name, getattr(row, name)) for row in rows]
        if all(cell == _NONE for cell in cells):
            continue
        left -= _BETWEEN + max(map(len, (title, *cells)))
        if left < 0:
            made.caption = "a wider terminal shows more"
            break
        made.add_column(title, justify="right", no_wrap=True)
        columns.append(cells)
    for number, row in enumerate(rows):
        state = Text(states[number], "green" if row.up else "red")
        made.add_row(Text(processes[number]), state, *(cells[number] for cells in columns))
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
