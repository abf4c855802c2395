"""`cloven enclave`: the trusted side of KV-Shield; light: no transformers, no model weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloven.cli.monitoring import METRICS_HOST, LogFormat, LogLevel, MetricsHost, MetricsPort


def enclave(
    trusted: Annotated[Path, typer.Argument(help="OUT/trusted of a KV-Shield bundle.")],
    listen: Annotated[str, typer.Option(help="ipc://PATH on one host, tcp://HOST:PORT between hosts.")],
    keys: Annotated[Path | None, typer.Option(help="The server's folder of keys, from `cloven keygen`; needed for tcp.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as PyTorch takes.")] = 0,
    insecure_plain_tcp: Annotated[bool, typer.Option("--insecure-plain-tcp", help="Listen on tcp without keys. INSECURE.")] = False,
    log_level: LogLevel = None,
    log_format: LogFormat = "text",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = METRICS_HOST,
) -> None:
    """Hold the keys of a KV cache: rotate, key and restore for the accelerator's process, until SIGTERM or SIGINT."""
    from cloven.cli.threads import let_threads_sleep

    let_threads_sleep()
    import signal

    import torch

    from cloven.cli.hardening import forbid_core_dumps
    from cloven.cli.monitoring import prepare_monitoring, published
    from cloven.kv_shield.service import EnclaveServer
    from cloven.wire.keys import worker_keys

    forbid_core_dumps()
    prepare_monitoring(log_level, log_format, metrics_port)
    if threads:
        torch.set_num_threads(threads)
    service = EnclaveServer(trusted, listen, keys=worker_keys(keys) if keys is not None else None, insecure_plain_tcp=insecure_plain_tcp)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    manifest = service.enclave.manifest
    with published(service, metrics_host, metrics_port):
        typer.echo(f"bundle {manifest.bundle}: keys of {len(manifest.layers)} layers ({manifest.config.mode}), listening at {listen}")
        service.serve()
