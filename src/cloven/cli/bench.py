"""`cloven bench`."""
from __future__ import annotations
import typer
app = typer.Typer(help="Measure.", no_args_is_help=True)
@app.callback()
def _schemes() -> None:
    pass
@app.command("slip")
def slip() -> None:
    pass
