"""`cloven prepare`: make bundles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cloven.bundle.bundle import Bundle

app = typer.Typer(help="Split a model into a trusted and an exposed half.", no_args_is_help=True)


@app.callback()
def _schemes() -> None:
    pass


@app.command("slip")
def slip(
    model: Annotated[str, typer.Argument(help="A model directory, or a model on the Hugging Face Hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder; gets OUT/trusted and OUT/exposed.")],
    no_public_relative: Annotated[
        bool, typer.Option("--no-public-relative", help="Where the model comes from: no similar model is public.")
    ] = False,
    public_base: Annotated[
        str | None,
        typer.Option(help="Where the model comes from: it is a fine-tune of this public model. Secret: the top of the difference."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Where it comes from: MODEL is public, the secret is this PEFT directory, a LoRA for it.")
    ] = None,
    secret_fraction: Annotated[float | None, typer.Option(help="Share of the parameters to keep secret; default: 0.03.")] = None,
    rank: Annotated[int | None, typer.Option(help="Keep this many singular values of every matrix instead.")] = None,
    precision: Annotated[str, typer.Option(help="int8, or int8x2: near-lossless, twice the worker's work.")] = "int8",
    insecure_scramble: Annotated[
        str | None,
        typer.Option(
            help="permutation or none, for comparison: what is exposed of a private model is then hidden badly, or not. INSECURE."
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="OUT/trusted/split.key of an earlier bundle: make the same bundle again.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text: columns that meet large activations are quantised finer (and can be told by their norms).")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, inline, pool (of processes), or ray.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda: where the factorisations are computed.")] = "cpu",
) -> None:
    """Split a model by SLIP: the secret low-rank part for the trusted process, the rest for an untrusted worker.

    Interrupted, the same command goes on where it stopped.
    """
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.progress import progress_bars
    from cloven.errors import BadInput
    from cloven.model.quiet import quiet_transformers
    from cloven.slip.config import SlipConfig
    from cloven.slip.prepare import prepare_slip

    forbid_core_dumps()
    quiet_transformers()
    if adapter is not None and secret_fraction is not None:
        raise BadInput("--secret-fraction: with --adapter the secret part is exactly the adapter")
    answers = [no_public_relative, public_base is not None, adapter is not None].count(True)
    if answers > 1:
        raise BadInput("--no-public-relative, --public-base and --adapter say where the model comes from: give one")
    if answers == 0 and (secret_fraction != 0 or rank):
        raise BadInput(
            "where does the model come from? Give one of: --adapter PEFT_DIR (MODEL is public, the LoRA is secret), --public-base BASE "
            "(MODEL is a fine-tune of a public model), --no-public-relative (nothing like it is public). A split that hides its weights by "
            "a scramble is undone by a public relative"
        )
    if rank is not None and secret_fraction is not None:
        raise BadInput("--rank and --secret-fraction both say how much to keep secret: give one")
    origin = "adapter" if adapter is not None else "public-base" if public_base is not None else "private"
    if insecure_scramble == "mixing":
        raise BadInput("--insecure-scramble: choose permutation or none; mixing is the default")
    scramble = insecure_scramble or ("mixing" if origin == "private" else "none")
    config = SlipConfig(0.03 if secret_fraction is None else secret_fraction, rank, precision, scramble, origin)
    with progress_bars() as progress, _going_on():
        bundle = prepare_slip(
            model,
            out,
            config,
            progress,
            adapter=adapter,
            public_base=public_base,
            key=key,
            calibration=calibration,
            engine=engine,
            device=device,
        )
    _print_summary(bundle, calibrated=calibration is not None)


@app.command("kv-shield")
def kv_shield(
    model: Annotated[str, typer.Argument(help="A model directory, or a model on the Hugging Face Hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder; gets OUT/trusted and OUT/exposed.")],
    mode: Annotated[
        str, typer.Option(help="permute: keys in the weights, as published. session: fresh keys for every sequence.")
    ] = "permute",
    noise_dims: Annotated[int, typer.Option(help="Random dimensions per head, in session mode.")] = 16,
    seal_idle: Annotated[bool, typer.Option("--seal-idle", help="Let the caches of idle sessions be encrypted.")] = False,
) -> None:
    """Keep the KV cache keyed on the accelerator; the keys are in an enclave, a small trusted process."""
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.progress import progress_bars
    from cloven.kv_shield.config import KvShieldConfig
    from cloven.kv_shield.prepare import prepare_kv_shield
    from cloven.model.quiet import quiet_transformers

    forbid_core_dumps()
    quiet_transformers()
    config = KvShieldConfig(mode, noise_dims, seal_idle)
    with progress_bars() as progress:
        manifest = prepare_kv_shield(model, out, config, progress)
    typer.echo(f"Bundle {manifest.bundle}: KV-Shield, {mode}, {len(manifest.layers)} attention layers")
    typer.echo(f"  enclave      {Path(out) / 'trusted'}   secret: `cloven enclave` serves it")
    typer.echo(f"  accelerator  {Path(out) / 'exposed'}   a model directory: `cloven generate`, from_pretrained")
    if mode == "permute":
        typer.echo(
            "Whoever has the public weights of this model finds the permutations by comparing: permute hides the cache from others only."
        )


@app.command("private-lora")
def private_lora(
    out: Annotated[Path, typer.Argument(help="A new folder; gets OUT/server and OUT/client.")],
    base: Annotated[str, typer.Option(help="The public base: a model directory, or a model on the Hugging Face Hub.")],
    adapter: Annotated[Path, typer.Option(help="A PEFT directory: a LoRA for that base.")],
    budget_tokens: Annotated[int, typer.Option(help="Rows that may be asked of every matrix, by all clients together.")],
    client_tokens: Annotated[int | None, typer.Option(help="Rows that one client may ask; default: the whole budget.")] = None,
    bits: Annotated[int, typer.Option(help="Bits of an answer, 8 to 16.")] = 16,
    hint: Annotated[str, typer.Option(help="lwe, or statistical: unconditional, at 1.7 times the upload.")] = "lwe",
    ledger: Annotated[Path | None, typer.Option(help="The adapter's ledger; default: OUT/server/ledger.sqlite.")] = None,
    signing_key: Annotated[Path | None, typer.Option(help="Ed25519 key in PEM to sign OUT/client with; default: a fresh one.")] = None,
) -> None:
    """Serve a LoRA adapter without giving it away at once, and without seeing what clients ask."""
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.progress import progress_bars
    from cloven.model.quiet import quiet_transformers
    from cloven.private_lora.config import PrivateLoraConfig
    from cloven.private_lora.prepare import prepare_private_lora

    forbid_core_dumps()
    quiet_transformers()
    config = PrivateLoraConfig(budget_tokens, client_tokens, bits, hint)
    with progress_bars() as progress:
        prepared = prepare_private_lora(base, adapter, out, config, ledger=ledger, signing_key=signing_key, progress=progress)
    groups = prepared.manifest.groups
    typer.echo(f"Bundle {prepared.manifest.bundle}: {sum(len(g.modules) for g in groups)} adapted linears, {len(groups)} queries per token")
    typer.echo(f"  server   {out / 'server'}   secret: `cloven adapter-server` serves it")
    typer.echo(f"  client   {out / 'client'}   for every client; fingerprint to pin: {prepared.fingerprint}")
    typer.echo(
        f"{budget_tokens:,} tokens of {bits} bits give away up to {prepared.revealed:.1%} of the adapter's narrowest matrix, "
        "whoever asks them: what answers reveal is metered, not hidden."
    )
    if prepared.earlier_budget is not None:
        typer.echo(f"The budget was {prepared.earlier_budget:,}; it is {budget_tokens:,} now, for every bundle of this adapter.")
    if prepared.revealed == 1:
        narrow = min(group.columns for group in groups)
        typer.echo(f"That is all of it: at most {8 * narrow // bits:,} tokens reconstruct a matrix with {narrow:,} columns exactly.")
    if prepared.quantisation_error > 0.01:
        typer.echo(
            f"WARNING: two int8 terms miss the adapter by {prepared.quantisation_error:.1%}: a few large columns leave the others few bits."
        )


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """Say that an interruption loses nothing."""
    from cloven.errors import Interrupted

    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; the same command goes on where it stopped") from error


def _print_summary(bundle: Bundle, calibrated: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    summary, parameters = bundle.manifest.summary, bundle.manifest.parameters
    table = Table(title=f"SLIP split, {parameters['precision']}, scramble {parameters['scramble']}")
    for column in ("layers", "count", "parameters", "kept secret", "energy kept secret", "exposed whole"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for name, kind in summary["kinds"].items():
        share = kind["secret_parameters"] / kind["parameters"]
        table.add_row(
            name,
            str(kind["layers"]),
            f"{kind['parameters']:,}",
            f"{share:.2%}",
            f"{kind['secret_energy']:.1%}",
            str(kind["layers_without_secret"]),
        )
    table.add_row("all", "", "", f"{summary['secret_fraction']:.2%}", f"{summary['secret_energy']:.1%}", "")
    console = Console()
    console.print(table)
    console.print(f"Quantisation error of the exposed part: {summary['quantisation_error']:.2e} (relative, Frobenius).")
    if parameters["origin"] == "adapter":
        text = " and of the calibration text" if calibrated else " alone"
        console.print(f"The secret part is exactly the adapter; the exposed half is a function of the public base{text}.")
    elif parameters["origin"] == "public-base":
        exposed = 1 - summary["secret_energy"]
        console.print(f"{exposed:.1%} of the fine-tune (energy of its difference from the public base) is exposed; keep more to hide more.")
    else:
        hidden = " and scrambled" if parameters["scramble"] != "none" else ""
        console.print(
            f"'exposed whole': matrices that got nothing of the budget; the worker holds them quantised{hidden}, but complete. "
            "Keep this bundle: another one of the same model, in the same hands, would give away what is secret here "
            "(--key OUT/trusted/split.key makes the same one again)."
        )
    console.print(f"Bundle {bundle.id}", highlight=False)
    console.print(f"  keep   {bundle.trusted}   secret", highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"  copy   {bundle.exposed}   to the worker; the trusted side keeps its copy too", highlight=False, soft_wrap=True, markup=False
    )
