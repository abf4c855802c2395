"""`cloven doctor`: does this installation work, and what to do if not."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check versions, devices, the exact product and sockets. Exit code 1 if something does not work."""
    from cloven.demo.checks import run_checks

    checks = run_checks()
    if as_json:
        typer.echo(json.dumps([vars(check) for check in checks]))
    else:
        for check in checks:
            typer.echo(
                f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.result}" + (f"\n      -> {check.advice}" if check.advice else "")
            )
    if not all(check.ok for check in checks):
        raise typer.Exit(1)
