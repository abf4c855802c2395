"""`cloven audit`: attack a bundle, and show what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cloven.audit.attack import Attack


def audit(
    out: Annotated[Path, typer.Argument(help="OUT of `cloven prepare kv-shield` or `private-lora`: both halves.")],
    text: Annotated[Path | None, typer.Option(help="A text file that the attacker wants; default: text sampled from the model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack a bundle with experiments on the user's own model; every attack also runs where it must succeed."""
    from cloven.audit.registry import audit as run
    from cloven.bundle.manifest import manifest_format
    from cloven.errors import BadInput
    from cloven.model.quiet import quiet_transformers
    from cloven.private_lora.manifest import SERVER

    quiet_transformers()
    tokens = None
    if text is not None and manifest_format(out / "server") == SERVER:
        raise BadInput("a private-LoRA bundle is audited without --text: its attacks are on weights and queries")
    if text is not None:
        from transformers import AutoTokenizer

        try:
            words = text.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"{text}: cannot be read as text") from error
        tokens = AutoTokenizer.from_pretrained(out / "exposed", trust_remote_code=False)(words, return_tensors="pt")["input_ids"][0, :512]
    attacks = run(out, tokens)
    if as_json:
        typer.echo(json.dumps({"attacks": [attack.to_dict() for attack in attacks]}))
    elif attacks[0].scheme.startswith("private-lora"):
        print_list(attacks)
    else:
        print_table(attacks)


def print_list(attacks: list[Attack]) -> None:
    """Attacks on one system: what each reached, and what it reaches where the protection is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What the parties recover")
    for column in ("attack", "scheme", "value", "chance", "weakened", "tries", "verdict"):
        table.add_column(column, justify="left" if column in ("attack", "scheme", "verdict") else "right")
    for attack in attacks:
        numbers = (attack.value, attack.chance, attack.weakened_value)
        table.add_row(attack.name.replace("_", " "), attack.scheme, *(f"{n:.1%}" for n in numbers), f"{attack.tries:,}", attack.verdict)
    console = Console()
    console.print(table)
    for attack in attacks:
        console.print(f"{attack.name.replace('_', ' ')}: {attack.metric}", highlight=False)


def print_table(attacks: list[Attack]) -> None:
    """Attacks by modes: what each reached."""
    from rich.console import Console
    from rich.table import Table

    schemes = list(dict.fromkeys(attack.scheme for attack in attacks))
    table = Table(title="What a thief of the cache recovers")
    table.add_column("attack")
    for scheme in schemes:
        table.add_column(scheme.removeprefix("kv-shield/"), justify="right")
    table.add_column("chance", justify="right")
    for name in dict.fromkeys(attack.name for attack in attacks):
        row = {attack.scheme: attack for attack in attacks if attack.name == name}
        cells = [f"{row[scheme].value:.1%} {row[scheme].verdict}" if scheme in row else "" for scheme in schemes]
        table.add_row(name.replace("_", " "), *cells, f"{next(iter(row.values())).chance:.1%}")
    console = Console()
    console.print(table)
    for name in dict.fromkeys(attack.name for attack in attacks):
        metric = next(attack.metric for attack in attacks if attack.name == name)
        console.print(f"{name.replace('_', ' ')}: {metric}", highlight=False)
