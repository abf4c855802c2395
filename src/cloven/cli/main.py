"""`cloven`: the commands, and one place where errors become exit codes.

Exit codes: 0 ok, 1 run-time failure, 2 bad input, 3 security failure. Commands import what they need when they run, so that
`cloven --help` is quick and `cloven worker` never imports what handles secrets.
"""

from __future__ import annotations

import signal
import sys

import typer

from cloven.cli import (
    adapter_server,
    audit,
    bench,
    demo,
    doctor,
    enclave,
    evaluate,
    generate,
    inspect,
    keygen,
    ledger,
    pads,
    prepare,
    serve,
    top,
    worker,
)
from cloven.errors import ClovenError

app = typer.Typer(
    name="cloven",
    help="Run a large language model on hardware nobody has to trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(prepare.app, name="prepare")
app.add_typer(bench.app, name="bench")
app.add_typer(pads.app, name="pads")
app.command("audit")(audit.audit)
app.command("worker")(worker.worker)
app.command("enclave")(enclave.enclave)
app.command("adapter-server")(adapter_server.adapter_server)
app.command("ledger")(ledger.ledger)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("evaluate")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("keygen")(keygen.keygen)
app.command("top")(top.top)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def _version(show: bool) -> None:
    if show:
        from cloven import __version__

        typer.echo(f"cloven {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version.")) -> None:
    from cloven.telemetry import configure_logging

    configure_logging()


_INTERRUPTED = 130


def run() -> None:
    """Run the command line; errors of ours are one line on standard error and an exit code. SIGTERM cleans up like an error does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except ClovenError as error:
        sys.stderr.write(f"cloven: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as left:  # Typer's, for a KeyboardInterrupt, without a word
        if left.code == _INTERRUPTED:
            sys.stderr.write("cloven: interrupted\n")
        raise
