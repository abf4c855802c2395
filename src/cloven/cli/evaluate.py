"""`cloven evaluate`: what the split costs in accuracy, and what the exposed half is worth alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloven.cli.peer_options import Exposed, InsecurePlainTcp, Keys, Timeout

if TYPE_CHECKING:
    from cloven.audit.evaluate import Evaluation


def evaluate(
    half: Annotated[Path, typer.Argument(help="OUT/trusted of `cloven prepare slip`.")],
    text: Annotated[Path, typer.Option(help="A text file, UTF-8; nothing of it is printed.")],
    original: Annotated[
        str | None, typer.Option(help="The unsplit model, a directory or a Hub id, to compare with; all of it is held in memory.")
    ] = None,
    worker: Annotated[
        str | None, typer.Option(envvar="CLOVEN_WORKER", help="The worker's address; without it one is started on this machine.")
    ] = None,
    keys: Keys = None,
    exposed: Exposed = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of the text at most.")] = 4096,
    context: Annotated[int | None, typer.Option(help="Tokens of a window; default: 512, or the model's limit if smaller.")] = None,
    exposed_only: Annotated[bool, typer.Option(help="Also what a thief of OUT/exposed would have.")] = True,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or auto (the bundle's). float32 shows the split's own error best.")
    ] = "float32",
    timeout: Timeout = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    insecure_plain_tcp: InsecurePlainTcp = False,
) -> None:
    """Perplexity of a split model through the real protocol, of the original and of the exposed half alone, and how often they agree."""
    from cloven.cli.threads import let_threads_sleep

    let_threads_sleep()
    import os

    from cloven.audit.evaluate import evaluate as run
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.progress import progress_bars
    from cloven.model.quiet import quiet_transformers

    forbid_core_dumps()
    quiet_transformers()
    for name in ("CLOVEN_WORKER", "CLOVEN_KEYS", "CLOVEN_EXPOSED"):
        os.environ.pop(name, None)  # attached with all settings, once
    words = _read(text, tokens)
    with progress_bars() as progress:
        result = run(
            half,
            words,
            original=original,
            worker=worker,
            keys=keys,
            exposed=exposed,
            tokens=tokens,
            context=context,
            exposed_only=exposed_only,
            dtype=dtype,
            progress=progress,
            timeout=timeout,
            insecure_plain_tcp=insecure_plain_tcp,
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        _print(result)


def _read(path: Path, tokens: int) -> str:
    """As much of a text file as is looked at."""
    from cloven.audit.windows import characters_needed
    from cloven.errors import BadInput

    try:
        with path.open(encoding="utf-8") as file:
            return file.read(characters_needed(tokens))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: is not UTF-8 text") from error


def _print(result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"bundle {result.bundle}, {result.precision}, computed in {result.dtype}")
    for column in ("", "perplexity", "change", "same next token", "largest logit difference"):
        table.add_column(column, justify="right" if column else "left")
    rows = {
        "original": result.original,
        "split": result.split,
        "exposed half alone": result.exposed_only,
        "the same, scramble known": result.exposed_only_unscrambled,
    }
    for name, model in rows.items():
        if model is None:
            continue
        if name == result.reference:
            table.add_row(name, f"{model.perplexity:,.4f}")
            continue
        near = abs(model.perplexity_change) < 1
        change = f"{model.perplexity_change:+.4%} ± {model.perplexity_change_error:.4%}" if near else f"×{1 + model.perplexity_change:,.1f}"
        table.add_row(name, f"{model.perplexity:,.4f}", change, f"{model.agreement:.2%}", f"{model.largest_logit_difference:.1e}")
    console = Console()
    console.print(table)
    sizes = f"{result.predicted:,} predicted tokens of {result.tokens:,}, in {result.windows:,} windows of up to {result.context}"
    console.print(f"{sizes}; compared with the {result.reference}", highlight=False)
    if result.own_worker:
        console.print("no --worker was given: one was started on this machine, in a process of its own", highlight=False)
    if result.exposed_only is not None:
        console.print("the thief of the exposed half is given embeddings, norms, biases and the sizes of the rows' scales", highlight=False)
