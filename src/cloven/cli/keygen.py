"""`cloven keygen`: CURVE keys for both parties."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def keygen(folder: Annotated[Path, typer.Argument(help="A folder; gets FOLDER/trusted and FOLDER/worker.")]) -> None:
    """Make the keys of both parties for tcp connections. Each party gets its own folder and nothing else."""
    from cloven.wire.keys import generate_keys

    generate_keys(folder)
    typer.echo(f"{folder}/trusted   stays with the trusted side: --keys {folder}/trusted")
    typer.echo(f"{folder}/worker    move it to the worker's machine: --keys {folder}/worker")
