"""`cloven worker`: the untrusted side. Imports `cloven.worker` and nothing that handles secrets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cloven.cli.monitoring import METRICS_HOST, LogFormat, LogLevel, MetricsHost, MetricsPort


def worker(
    exposed: Annotated[Path, typer.Argument(help="OUT/exposed of a bundle.")],
    listen: Annotated[str, typer.Option(help="ipc://PATH on one host, tcp://HOST:PORT between hosts.")],
    keys: Annotated[Path | None, typer.Option(help="The worker's folder of keys, from `cloven keygen`; needed for tcp.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as PyTorch takes.")] = 0,
    part: Annotated[
        str, typer.Option(help="Serve a part of the bundle: layers:1/2 or rows:1/2 for the first of two workers; default: everything.")
    ] = "",
    record: Annotated[Path | None, typer.Option(help="Write what is received to this file (what was there is lost), for audits.")] = None,
    engine: Annotated[str, typer.Option(help="process, or ray: several workers as actors, inside the untrusted zone.")] = "process",
    replicas: Annotated[int, typer.Option(min=1, help="How many, with --engine ray; each has a port or path of its own.")] = 1,
    placement: Annotated[
        str, typer.Option(help="With --engine ray: layers or rows, so that each holds a part; default: each holds everything.")
    ] = "",
    insecure_plain_tcp: Annotated[bool, typer.Option("--insecure-plain-tcp", help="Listen on tcp without keys. INSECURE.")] = False,
    log_level: LogLevel = None,
    log_format: LogFormat = "text",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = METRICS_HOST,
) -> None:
    """Serve an exposed half: multiply masked integers, for any number of sessions, until SIGTERM or SIGINT."""
    from cloven.cli.threads import let_threads_sleep

    let_threads_sleep()
    import signal

    import torch

    from cloven.cli.monitoring import prepare_monitoring, published
    from cloven.errors import BadInput
    from cloven.wire.keys import worker_keys
    from cloven.worker.service import Worker

    prepare_monitoring(log_level, log_format, metrics_port)
    if threads:
        torch.set_num_threads(threads)
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"device {device!r}: choose cpu, cuda or cuda:N")
    if engine not in ("process", "ray") or placement not in ("", "layers", "rows"):
        raise BadInput("engine: choose process or ray; placement: layers or rows, or leave it out")
    if engine == "ray":
        if part or record or threads or metrics_port:
            raise BadInput("--part, --record, --threads and --metrics-port belong to one process: leave them out with --engine ray")
        _serve_on_ray(exposed, listen, replicas, placement, keys, device, insecure_plain_tcp)
        return
    if replicas > 1 or placement:
        raise BadInput("--replicas and --placement belong to --engine ray; a process holds everything, or --part")
    service = Worker(
        exposed,
        listen,
        keys=worker_keys(keys) if keys is not None else None,
        device=device,
        insecure_plain_tcp=insecure_plain_tcp,
        record=record,
        part=part,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    matrices = service.matrices
    groups = sum(matrix is not None for matrix in matrices.groups)
    with published(service, metrics_host, metrics_port):
        where = f"{matrices.backend.device} ({matrices.backend.name})"
        typer.echo(f"bundle {matrices.bundle.hex()}: {groups} matrices on {where}, listening at {listen}")
        service.serve()


def _serve_on_ray(
    exposed: Path, listen: str, replicas: int, placement: str, keys: Path | None, device: str, insecure_plain_tcp: bool
) -> None:
    import signal
    import threading

    from cloven.cluster.ray_workers import RayWorkers

    ended = threading.Event()
    with RayWorkers(
        exposed, listen, replicas, placement=placement, keys=keys, device=device, insecure_plain_tcp=insecure_plain_tcp
    ) as workers:
        for number in (signal.SIGTERM, signal.SIGINT):  # now: Ray sets handlers of its own
            signal.signal(number, lambda *_: ended.set())
        for address in workers.addresses:
            typer.echo(address)
        sys.stdout.flush()
        ended.wait()
