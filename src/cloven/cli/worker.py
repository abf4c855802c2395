"""`cloven worker`: the untrusted side. Imports `cloven.worker` and nothing that handles secrets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def worker(
    exposed: Annotated[Path, typer.Argument(help="OUT/exposed of a bundle.")],
    listen: Annotated[str, typer.Option(help="ipc://PATH on one host, tcp://HOST:PORT between hosts.")],
    keys: Annotated[Path | None, typer.Option(help="The worker's folder of keys, from `cloven keygen`; needed for tcp.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as PyTorch takes.")] = 0,
    record: Annotated[Path | None, typer.Option(help="Write what is received to this file (what was there is lost), for audits.")] = None,
    insecure_plain_tcp: Annotated[bool, typer.Option("--insecure-plain-tcp", help="Listen on tcp without keys. INSECURE.")] = False,
) -> None:
    """Serve an exposed half: multiply masked integers, for any number of sessions, until SIGTERM or SIGINT."""
    from cloven.cli.threads import let_threads_sleep

    let_threads_sleep()
    import signal

    import torch

    from cloven.errors import BadInput
    from cloven.wire.keys import worker_keys
    from cloven.worker.service import Worker

    if threads:
        torch.set_num_threads(threads)
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"device {device!r}: choose cpu, cuda or cuda:N")
    service = Worker(
        exposed,
        listen,
        keys=worker_keys(keys) if keys is not None else None,
        device=device,
        insecure_plain_tcp=insecure_plain_tcp,
        record=record,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    matrices = service.matrices
    typer.echo(
        f"bundle {matrices.bundle.hex()}: {len(matrices.groups)} matrices on {matrices.backend.device} "
        f"({matrices.backend.name}), listening at {listen}"
    )
    service.serve()
