"""`cloven adapter-server`: the owner's side of private LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloven.cli.monitoring import METRICS_HOST, LogFormat, LogLevel, MetricsHost, MetricsPort


def adapter_server(
    folders: Annotated[list[Path], typer.Argument(help="OUT/server of one or more private-LoRA bundles.")],
    listen: Annotated[str, typer.Option(help="ipc://PATH on one host, tcp://HOST:PORT between hosts.")],
    keys: Annotated[Path | None, typer.Option(help="The server's folder of keys, from `cloven keygen`; needed for tcp.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as PyTorch takes.")] = 1,
    insecure_plain_tcp: Annotated[bool, typer.Option("--insecure-plain-tcp", help="Listen on tcp without keys. INSECURE.")] = False,
    insecure_fhe_semi_honest: Annotated[
        bool, typer.Option("--insecure-fhe-semi-honest", help="Also answer the fhe backend: a cheating client gets the adapter. INSECURE.")
    ] = False,
    log_level: LogLevel = None,
    log_format: LogFormat = "text",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = METRICS_HOST,
) -> None:
    """Serve adapters to clients whose input stays encrypted, as much as the ledger allows, until SIGTERM or SIGINT."""
    from cloven.cli.threads import let_threads_sleep

    let_threads_sleep()
    import signal

    import torch

    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.monitoring import prepare_monitoring, published
    from cloven.private_lora.server import AdapterServer
    from cloven.wire.keys import worker_keys

    forbid_core_dumps()
    prepare_monitoring(log_level, log_format, metrics_port)
    if threads:
        torch.set_num_threads(threads)
    service = AdapterServer(
        folders,
        listen,
        keys=worker_keys(keys) if keys is not None else None,
        insecure_plain_tcp=insecure_plain_tcp,
        insecure_fhe_semi_honest=insecure_fhe_semi_honest,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    with published(service, metrics_host, metrics_port):
        for adapter in service.adapters.values():
            typer.echo(f"bundle {adapter.manifest.bundle}: {len(adapter.matrices)} groups, listening at {listen}")
        service.serve()
