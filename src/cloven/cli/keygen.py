"""`cloven keygen`: CURVE keys for both parties."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def keygen(
    folder: Annotated[Path, typer.Argument(help="A folder; gets FOLDER/trusted and FOLDER/worker.")],
    client_of: Annotated[
        Path | None, typer.Option(help="A server's folder of keys: make keys of one more client, FOLDER/trusted, and admit it there.")
    ] = None,
) -> None:
    """Make the keys of both parties for tcp connections. Each party gets its own folder and nothing else."""
    from cloven.wire.keys import generate_client, generate_keys

    if client_of is not None:
        admitted = generate_client(folder, client_of)
        typer.echo(f"{folder}/trusted   goes to the client: --keys {folder}/trusted")
        typer.echo(f"{admitted}   admits it; removing that file shuts it out")
        return
    generate_keys(folder)
    typer.echo(f"{folder}/trusted   stays with the trusted side: --keys {folder}/trusted")
    typer.echo(f"{folder}/worker    move it to the worker's machine: --keys {folder}/worker")
