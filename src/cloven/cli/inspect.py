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
    from cloven.bundle.manifest import manifest_format
    from cloven.kv_shield.manifest import TRUSTED
    from cloven.private_lora.manifest import CLIENT

    if manifest_format(out / "client") == CLIENT:
        _private_lora(out, verify, as_json)
        return
    if manifest_format(out / "trusted") == TRUSTED:
        _kv_shield(out, verify, as_json)
        return
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


def _kv_shield(out: Path, verify: bool, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from cloven.kv_shield.manifest import read_halves

    trusted, exposed = read_halves(out, verify=verify)
    layers = trusted.layers
    description: dict[str, Any] = {
        "bundle": trusted.bundle,
        "scheme": "kv-shield",
        "parameters": trusted.config.to_dict(),
        "layers": [[layer.heads, layer.kv_heads, layer.head_dim] for layer in layers],
        "positions": trusted.limit,
        "exposed_bytes": sum((out / "exposed" / name).stat().st_size for name in exposed.files if (out / "exposed" / name).is_file()),
        "trusted_bytes": sum((out / "trusted" / name).stat().st_size for name in trusted.files if (out / "trusted" / name).is_file()),
        "verified": verify,
    }
    if as_json:
        typer.echo(json.dumps(description))
        return
    table = Table(title=f"bundle {trusted.bundle}", show_header=False)
    table.add_row("scheme", "kv-shield")
    for name, value in description["parameters"].items():
        table.add_row(name.replace("_", " "), str(value))
    table.add_row("attention layers", str(len(layers)))
    table.add_row("query heads, kv heads, dimensions", f"{layers[0].heads}, {layers[0].kv_heads}, {layers[0].head_dim}")
    table.add_row("calls to the enclave per token", str(sum(1 + (layer.rotary or trusted.config.mode == "session") for layer in layers)))
    table.add_row("model directory", f"{description['exposed_bytes'] / 1e6:,.1f} MB")
    table.add_row("the enclave's keys", f"{description['trusted_bytes'] / 1e3:,.1f} kB")
    table.add_row("files", "all hashes match" if verify else "not hashed (--verify does)")
    Console().print(table)


def _private_lora(out: Path, verify: bool, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from cloven.bundle.verification import verify_files
    from cloven.errors import ForeignBundle
    from cloven.private_lora.manifest import ServerManifest, fingerprint, read_client

    client = read_client(out / "client")
    server = ServerManifest.read(out / "server") if (out / "server").is_dir() else None  # a client has no server's half
    if server is not None and server.bundle != client.bundle:
        raise ForeignBundle(f"{out}: the halves are of two bundles, {client.bundle} and {server.bundle}")
    if verify:
        verify_files(out / "client", client.files)
        if server is not None:
            verify_files(out / "server", server.files)
    description: dict[str, Any] = {
        "bundle": client.bundle,
        "scheme": "private-lora",
        "parameters": {"bits": client.bits, "hint": client.hint},
        "fingerprint": fingerprint(out / "client"),
        "base": client.base,
        "groups": [[group.rows, group.columns] for group in client.groups],
        "modules": sum(len(group.modules) for group in client.groups),
        "client_bytes": sum((out / "client" / name).stat().st_size for name in client.files if (out / "client" / name).is_file()),
        "verified": verify,
    }
    if as_json:
        typer.echo(json.dumps(description))
        return
    table = Table(title=f"bundle {client.bundle}", show_header=False)
    table.add_row("scheme", "private-lora")
    table.add_row("bits of an answer, hint", f"{client.bits}, {client.hint}")
    table.add_row("adapted linears, queries per token", f"{description['modules']}, {len(client.groups)}")
    table.add_row("client's half", f"{description['client_bytes'] / 1e6:,.1f} MB")
    table.add_row("files", "all hashes match" if verify else "not hashed (--verify does)")
    Console().print(table)
    typer.echo(f"fingerprint to pin          {description['fingerprint']}")  # whole, whatever the terminal's width
    typer.echo(f"base (sha256 over tensors)  {client.base}")
