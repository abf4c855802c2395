"""`cloven serve`: an OpenAI-compatible endpoint over a protected model."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cloven.cli import peer_options as peer
from cloven.cli.monitoring import METRICS_HOST, LogFormat, LogLevel, MetricsHost, MetricsPort


def serve(
    half: peer.Half,
    worker: peer.Workers = None,
    placement: peer.Placement = "replicas",
    pads: peer.Pads = None,
    on_empty: peer.OnEmpty = "fail",
    enclave: peer.Enclave = None,
    server: peer.AdapterServer = None,
    base: peer.Base = None,
    pin: peer.Pin = None,
    keys: peer.Keys = None,
    exposed: peer.Exposed = None,
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
    dtype: peer.Dtype = "auto",
    timeout: peer.Timeout = 30.0,
    engine: Annotated[
        str,
        typer.Option(help="process, or ray: several replicas, each a trusted process that holds this half; only inside one zone of trust."),
    ] = "process",
    replicas: Annotated[int, typer.Option(min=1, help="How many, with --engine ray; each has a session and pads of its own.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as one JSON object.")] = False,
    insecure_plain_tcp: peer.InsecurePlainTcp = False,
    log_level: LogLevel = None,
    log_format: LogFormat = "text",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = METRICS_HOST,
    insecure_open: Annotated[
        bool, typer.Option("--insecure-open", help="Listen on the network without API keys: everybody can use the model. INSECURE.")
    ] = False,
    insecure_ray_cluster: Annotated[
        bool,
        typer.Option(
            "--insecure-ray-cluster",
            help="With --engine ray: use the cluster at RAY_ADDRESS. Whoever reaches its network gets the secrets. INSECURE.",
        ),
    ] = False,
) -> None:
    """Serve a protected model to OpenAI's clients, until SIGTERM or SIGINT: /v1/chat/completions, /v1/completions, /v1/models, /health."""
    from cloven.cli.threads import let_threads_sleep

    if enclave is None or worker:  # see `cloven generate`
        let_threads_sleep()
    from cloven.cli.monitoring import prepare_monitoring, published_of
    from cloven.errors import BadInput
    from cloven.serving.requirements import require_serving

    require_serving()
    prepare_monitoring(log_level, log_format, metrics_port)
    if engine not in ("process", "ray"):
        raise BadInput(f"engine {engine!r}: choose process or ray")
    if engine == "process" and (replicas > 1 or insecure_ray_cluster):
        raise BadInput("--replicas and --insecure-ray-cluster belong to --engine ray")
    if metrics_port is not None and metrics_port == port:
        raise BadInput(f"--port and --metrics-port are both {port}: two servers need two ports")

    from cloven.cli.hardening import forbid_core_dumps
    from cloven.model.quiet import quiet_transformers
    from cloven.model.runtime import RuntimeOptions
    from cloven.serving.api_keys import read_api_keys
    from cloven.serving.half import open_half
    from cloven.serving.loading import LoadOptions, load
    from cloven.serving.options import ServeOptions
    from cloven.serving.server import OPEN_BANNER, Application, bind
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
    with bind(serving) as listener, contextlib.ExitStack() as stack:
        if engine == "ray":
            from cloven.serving.replicas.serve import replicated

            name, front = stack.enter_context(replicated(found, how, runtime, serving, replicas, forbid_core_dumps, insecure_ray_cluster))
            application: Application = front
            app = front.application(api_keys)
            stack.enter_context(published_of("serve", front.samples, metrics_host, metrics_port))
        else:
            from cloven.serving.endpoint import Endpoint  # takes seconds: what is wrong has been said before

            served = load(found, how, runtime)
            stack.callback(served.close)  # however this ends: its threads must not meet the end of the interpreter
            name, made = served.name, Endpoint(served, serving)
            application, app = made, made.application(api_keys)
            stack.enter_context(published_of("serve", made.samples, metrics_host, metrics_port))
        url = f"{serving.url}:{listener.getsockname()[1]}"

        def ready() -> None:
            line = f"{name} ({found.scheme}): serving at {url}/v1"
            typer.echo(json.dumps({"url": f"{url}/v1", "model": name, "scheme": found.scheme}) if as_json else line)
            sys.stdout.flush()

        answer(app, application, listener, serving, ready)
