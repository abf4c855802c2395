"""`cloven ledger`: what an adapter's answers have given away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def ledger(
    server: Annotated[Path, typer.Argument(help="OUT/server of a private-LoRA bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the ledger of an adapter: rows charged per group of linears and client, and what is left."""
    from contextlib import closing

    from rich.console import Console
    from rich.table import Table

    from cloven.private_lora.config import revealed_share
    from cloven.private_lora.ledger import Ledger
    from cloven.private_lora.manifest import ServerManifest

    manifest = ServerManifest.read(server)
    with closing(Ledger(manifest.ledger_path(server), manifest.adapter)) as book:
        budget, share = book.budget()
        accounts = book.accounts()
    pad = manifest.parameters.pad_columns
    groups: list[dict[str, Any]] = []
    for group in manifest.groups:
        matrices = group.name.split("+")  # all of a group are charged alike; another bundle of the adapter may group them otherwise
        used = max(sum(account.rows for account in accounts if account.matrix == matrix) for matrix in matrices)
        clients = {account.client: account.rows for account in accounts if account.matrix == matrices[0]}
        revealed = revealed_share(used, group.columns - pad, manifest.bits, group.entropy)
        groups.append({"group": group.name, "used": used, "left": max(0, budget - used), "revealed": revealed, "clients": clients})
    if as_json:
        typer.echo(json.dumps({"adapter": manifest.adapter, "budget": budget, "client_budget": share, "groups": groups}))
        return
    table = Table(title=f"adapter {manifest.adapter[:16]}…: {budget:,} rows for all clients, {share:,} for one")
    for column in ("group", "used", "left", "given away at most", "clients"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for record in groups:
        table.add_row(
            record["group"], f"{record['used']:,}", f"{record['left']:,}", f"{record['revealed']:.1%}", str(len(record["clients"]))
        )
    console = Console()
    console.print(table)
    console.print("Rows that running servers have reserved and not answered count as used; a server gives them back when it ends.")
