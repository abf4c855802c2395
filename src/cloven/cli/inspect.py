"""`cloven inspect`: describe a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    out: Annotated[Path, typer.Argument(help="OUT of `cloven prepare`.")],
    verify: Annotated[bool, typer.Option("--verify", help="Also hash every file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a bundle: scheme, parameters, groups, what is secret; never its contents."""
    from rich.console import Console
    from rich.table import Table

    from cloven.bundle.bundle import open_bundle

    bundle = open_bundle(out)
    if verify:
        bundle.verify()
    manifest = bundle.manifest
    description: dict[str, Any] = {
        "bundle": bundle.id,
        "scheme": manifest.scheme,
        "parameters": manifest.parameters,
        "summary": manifest.summary,
        "groups": [[group.rows, group.columns] for group in manifest.exposed.groups],
        "exposed_bytes": sum(group.rows * group.columns for group in manifest.exposed.groups),
        "trusted_bytes": sum((bundle.trusted / name).stat().st_size for name in manifest.files if (bundle.trusted / name).is_file()),
        "verified": verify,
    }
    if as_json:
        typer.echo(json.dumps(description))
        return
    table = Table(title=f"bundle {bundle.id}", show_header=False)
    table.add_row("scheme", manifest.scheme)
    for name, value in manifest.parameters.items():
        table.add_row(name.replace("_", " "), str(value))
    table.add_row("groups (exchanges per token)", str(len(manifest.exposed.groups)))
    table.add_row("exposed matrices", f"{description['exposed_bytes'] / 1e6:,.1f} MB of int8")
    table.add_row("trusted half", f"{description['trusted_bytes'] / 1e6:,.1f} MB")
    if "secret_fraction" in manifest.summary:
        table.add_row("parameters kept secret", f"{manifest.summary['secret_fraction']:.2%}")
        table.add_row("energy kept secret", f"{manifest.summary['secret_energy']:.1%}")
    table.add_row("files", "all hashes match" if verify else "not hashed (--verify does)")
    Console().print(table)
