"""`cloven audit`: attack a bundle, and show what is left."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from cloven.audit.attack import Attack
    from cloven.audit.findings import Findings

MOST_TOKENS = 4096
_TITLE = b"<title>cloven audit</title>"
MOST_MINUTES, MOST_SEED = 10_000, 2**62


def audit(
    out: Annotated[Path, typer.Argument(help="OUT of `cloven prepare`: both halves.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text file, at least 128 tokens: what perplexities are measured on (up to 4,096 tokens of it); of KV-Shield, what a "
            "cache's thief wants (up to 512). Default: sampled from the model."
        ),
    ] = None,
    relative: Annotated[
        str | None, typer.Option(metavar="MODEL", help="SLIP: a public relative of the model, which the attackers have too.")
    ] = None,
    budget_minutes: Annotated[
        float | None, typer.Option(min=0, max=MOST_MINUTES, help="SLIP: for the attacks that train, together; 0: none of them. Default: 3.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=0, max=10**6, help="SLIP: instead of minutes, steps of each training: the same figures on any day."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST_SEED, help="Of the attackers' choices; no secret depends on it. Default: 0.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the HTML report goes; default: OUT/audit.html.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack a bundle with experiments on the user's own model; every attack also runs where it must succeed."""
    from cloven.audit.plots import matplotlib_parts
    from cloven.audit.registry import BUDGET
    from cloven.audit.registry import audit as run
    from cloven.audit.report import report as page
    from cloven.audit.slip.training import Budget
    from cloven.bundle.durable import write_durably
    from cloven.bundle.manifest import manifest_format
    from cloven.bundle.trusted_manifest import FORMAT as SLIP_TRUSTED
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.progress import progress_bars
    from cloven.errors import BadBundle, BadInput, RunError
    from cloven.model.quiet import quiet_transformers
    from cloven.private_lora.manifest import SERVER

    forbid_core_dumps()
    quiet_transformers()
    if report is not None and no_report:
        raise BadInput("--report beside --no-report: give one of them")
    if text is not None and manifest_format(out / "server") == SERVER:
        raise BadInput("a private-LoRA bundle is audited without --text: its attacks are on weights and queries")
    if not manifest_format(out / "trusted") and not manifest_format(out / "server"):
        raise BadBundle(f"{out}: there is no bundle here with both halves; give OUT of `cloven prepare`")
    slip = manifest_format(out / "trusted") == SLIP_TRUSTED
    if not slip and (budget_minutes, steps) != (None, None):
        raise BadInput("--steps and --budget-minutes are for SLIP bundles: attacks on the other schemes do not train")
    if steps is not None and budget_minutes is not None:
        raise BadInput("--steps beside --budget-minutes: give one of them")
    place = None if no_report else report or out / "audit.html"
    if place is not None and slip:
        matplotlib_parts()  # for the figures; where it is missing, now and not in an hour
    if report is not None and not report.parent.is_dir():
        raise BadInput(f"{report}: no such folder for the report")
    if place is not None:
        _require_place(place, out)  # now, and not when all is done
    public = None
    if relative is not None:
        from cloven.model.source import open_source

        public = open_source(relative).load().float().eval()
    with progress_bars() as progress:
        tokens = tokens_of(text, out) if text is not None else None
        budget = BUDGET if budget_minutes is None else Budget(60 * budget_minutes)
        budget = budget if steps is None else Budget(steps=steps)
        findings = run(out, tokens, seed=seed or 0, budget=budget, relative=public, progress=progress)
    if as_json:  # first: nothing is lost if the page cannot be written
        typer.echo(json.dumps({**findings.to_dict(), "report": str(place.absolute()) if place is not None else None}))
    if place is not None:
        try:
            write_durably(place, page(_drawable(findings)).encode())
        except OSError as error:
            raise RunError(f"{place}: the report cannot be written: {error.strerror}") from error
    if not as_json:
        _print(findings, place)
    if findings.failed:
        raise findings.failed[0]


def _print(findings: Findings, place: Path | None) -> None:
    if findings.scheme == "kv-shield":
        print_table(findings.attacks)
    else:
        print_list(findings.attacks)
    from cloven.audit.report import headlines

    for line in findings.not_tested:
        typer.echo(f"not tested: {line}")
    for who, verdict, why in headlines(findings):
        typer.echo(f"{verdict}: {who}" + (f" ({why})" if why else ""))
    if place is not None:
        typer.echo(f"report: {place}")


def _require_place(place: Path, out: Path) -> None:
    """Refuse what is not a report's place: a folder or a device, a file that is no earlier report, the bundle's halves.

    Raises:
        BadInput: it is.
    """
    from cloven.errors import BadInput

    wrong = BadInput(f"{place}: the report cannot be written there; give --report FILE or --no-report")
    halves = [(out / name).resolve() for name in ("trusted", "exposed", "server", "client")]
    if any(half in place.resolve().parents for half in halves):
        raise BadInput(f"{place}: that is inside the bundle; give another place for the report")
    try:
        if place.is_symlink() or (place.exists() and not place.is_file()):
            raise wrong
        if place.exists():
            with place.open("rb") as file:
                if _TITLE not in file.read(1000):
                    raise BadInput(f"{place} exists and is no report: it is not overwritten")
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise wrong from error


def _drawable(findings: Findings) -> Findings:
    """What a report can show here: without Matplotlib no figures, and a line that says so; SLIP's audit does not begin without it."""
    from cloven.audit.plots import matplotlib_parts
    from cloven.errors import BadInput

    if findings.figures:
        try:
            matplotlib_parts()
        except BadInput:
            typer.echo("the report has no figures: they need Matplotlib, pip install 'cloven[audit]'", err=True)
            return replace(findings, figures=[])
    return findings


def tokens_of(text: Path, out: Path) -> Tensor:
    """The first tokens of a file, int64 [T].

    Raises:
        BadInput: no text.
    """
    from transformers import AutoTokenizer

    from cloven.audit.windows import characters_needed
    from cloven.bundle.manifest import manifest_format
    from cloven.errors import BadInput
    from cloven.kv_shield.manifest import TRUSTED

    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"{text}: cannot be read as text") from error
    shield = manifest_format(out / "trusted") == TRUSTED
    tokenizer = AutoTokenizer.from_pretrained(out / ("exposed" if shield else "trusted"), trust_remote_code=False)
    tokens: Tensor = tokenizer(words[: characters_needed(MOST_TOKENS)], return_tensors="pt", verbose=False)["input_ids"][
        0, : 512 if shield else MOST_TOKENS
    ]
    return tokens


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
        console.print(f"{attack.name.replace('_', ' ')}: {attack.metric} ({attack.adversary})", highlight=False)


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
        one = next(attack for attack in attacks if attack.name == name)
        console.print(f"{name.replace('_', ' ')}: {one.metric} ({one.adversary}; {one.tries:,} tries)", highlight=False)
