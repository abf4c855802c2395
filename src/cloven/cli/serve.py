"""`cloven serve`: an OpenAI-compatible endpoint over a protected model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    half: Annotated[Path, typer.Argument(help="OUT/trusted (SLIP), OUT/exposed (KV-Shield) or OUT/client (private LoRA).")],
    worker: Annotated[
        list[str] | None,
        typer.Option(
            envvar="CLOVEN_WORKER", help="SLIP: the worker's address, ipc://PATH or tcp://HOST:PORT; several times for several workers."
        ),
    ] = None,
    placement: Annotated[
        str, typer.Option(help="SLIP, several workers: replicas, layers or rows (A,B: B is a replica of A; see `cloven worker --part`).")
    ] = "replicas",
    pads: Annotated[Path | None, typer.Option(envvar="CLOVEN_PADS", help="SLIP: a pad store, from `cloven pads fill`.")] = None,
    on_empty: Annotated[str, typer.Option(help="SLIP: when the store has run dry: fail, wait, or compute.")] = "fail",
    enclave: Annotated[str | None, typer.Option(envvar="CLOVEN_ENCLAVE", help="KV-Shield: the enclave's address.")] = None,
    server: Annotated[str | None, typer.Option(envvar="CLOVEN_SERVER", help="Private LoRA: the adapter server's address.")] = None,
    base: Annotated[
        str | None, typer.Option(envvar="CLOVEN_BASE", help="Private LoRA: the base model's directory, where it is not on the Hub.")
    ] = None,
    pin: Annotated[str | None, typer.Option(envvar="CLOVEN_PIN", help="Private LoRA: the fingerprint that OUT/client must have.")] = None,
    keys: Annotated[Path | None, typer.Option(envvar="CLOVEN_KEYS", help="This side's folder of keys; needed for tcp.")] = None,
    exposed: Annotated[Path | None, typer.Option(envvar="CLOVEN_EXPOSED", help="SLIP: the trusted side's own copy of OUT/exposed.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; another one than this machine's own needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="API keys that clients may use, one per line; mode 0600.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM: serve https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM, without a passphrase.")] = None,
    model_name: Annotated[str | None, typer.Option(help="What clients call the model; default: the name of OUT.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A chat template (Jinja), where the model has none.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 1024,
    max_running: Annotated[int, typer.Option(min=1, help="Requests computed together (continuous batching); 1: one after the other.")] = 16,
    batch_rows: Annotated[int, typer.Option(min=1, help="Tokens of all requests in one pass of the model.")] = 256,
    cache_tokens: Annotated[int, typer.Option(min=16, help="Tokens of all requests in the cache; a longer one is computed alone.")] = 8192,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; the next one is refused (429).")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="KiB of a request, at most.")] = 1024,
    fixed_length: Annotated[
        bool, typer.Option("--fixed-length", help="Compute every answer to its max_tokens: its length does not show in the exchanges.")
    ] = False,
    constant_rows: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="SLIP: every exchange has N rows, and every pass of the model N tokens at most; costs pads."),
    ] = 0,
    page: Annotated[
        bool | None,
        typer.Option(help="A page for a browser at /: chat, and what the worker sees. Default: where only this machine can connect."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR", help="The unprotected original, which the page compares with; loaded here when it is asked for."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16: what the trusted process computes in.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that an answer of the worker may take.")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as one JSON object.")] = False,
    insecure_plain_tcp: Annotated[bool, typer.Option("--insecure-plain-tcp", help="Use tcp without keys. INSECURE.")] = False,
    insecure_open: Annotated[
        bool, typer.Option("--insecure-open", help="Listen on the network without API keys: everybody can use the model. INSECURE.")
    ] = False,
) -> None:
    """Serve a protected model to OpenAI's clients, until SIGTERM or SIGINT: /v1/chat/completions, /v1/completions, /v1/models, /health."""
    from cloven.cli.threads import let_threads_sleep

    if enclave is None or worker:  # see `cloven generate`
        let_threads_sleep()
    from cloven.serving.requirements import require_serving

    require_serving()
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.errors import BadInput
    from cloven.model.quiet import quiet_transformers
    from cloven.model.runtime import RuntimeOptions
    from cloven.serving.api_keys import read_api_keys
    from cloven.serving.endpoint import Endpoint
    from cloven.serving.half import open_half
    from cloven.serving.loading import LoadOptions, load
    from cloven.serving.options import ServeOptions
    from cloven.serving.server import OPEN_BANNER, bind
    from cloven.serving.server import serve as answer
    from cloven.telemetry import logger

    forbid_core_dumps()
    quiet_transformers()
    serving = ServeOptions(
        host=host,
        port=port,
        api_key_file=api_key_file,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        insecure_open=insecure_open,
        max_tokens=max_tokens,
        max_running=max_running,
        batch_rows=batch_rows,
        cache_tokens=cache_tokens,
        max_queue=max_queue,
        max_body=1024 * max_body,
        fixed_length=fixed_length,
        constant_rows=constant_rows,
        page=page,
        compare=compare,
    )
    how = LoadOptions(model_name, chat_template, dtype, base, pin)
    found = open_half(half, " ".join(worker or []) or None, enclave, server)
    if constant_rows and found.scheme != "slip":
        raise BadInput(f"constant_rows pads exchanges with a SLIP worker, and this bundle is {found.scheme}")
    runtime = RuntimeOptions(
        found.address,
        keys,
        exposed,
        timeout,
        insecure_plain_tcp=insecure_plain_tcp,
        pin=pin,
        placement=placement,
        pads=pads,
        on_empty=on_empty,
        constant_rows=constant_rows,
    )
    api_keys = read_api_keys(api_key_file) if api_key_file is not None else None
    if api_keys is None and not serving.local:
        logger.warning(OPEN_BANNER)
    with bind(serving) as listener:
        served = load(found, how, runtime)
        url = f"{serving.url}:{listener.getsockname()[1]}"

        def ready() -> None:
            line = f"{served.name} ({found.scheme}): serving at {url}/v1"
            typer.echo(json.dumps({"url": f"{url}/v1", "model": served.name, "scheme": found.scheme}) if as_json else line)
            sys.stdout.flush()

        answer(Endpoint(served, serving).application(api_keys), listener, serving, ready)
