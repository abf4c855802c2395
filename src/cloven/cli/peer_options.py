"""What commands have in common that use a protected model: its half here, and where the other half is. See `cloven.model.runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Half = Annotated[Path, typer.Argument(help="OUT/trusted (SLIP), OUT/exposed (KV-Shield) or OUT/client (private LoRA).")]
Workers = Annotated[
    list[str] | None,
    typer.Option(
        envvar="CLOVEN_WORKER", help="SLIP: the worker's address, ipc://PATH or tcp://HOST:PORT; several times for several workers."
    ),
]
Placement = Annotated[
    str, typer.Option(help="SLIP, several workers: replicas, layers or rows (A,B: B is a replica of A; see `cloven worker --part`).")
]
Pads = Annotated[Path | None, typer.Option(envvar="CLOVEN_PADS", help="SLIP: a pad store, from `cloven pads fill`.")]
OnEmpty = Annotated[str, typer.Option(help="SLIP: when the store has run dry: fail, wait, or compute.")]
Enclave = Annotated[str | None, typer.Option(envvar="CLOVEN_ENCLAVE", help="KV-Shield: the enclave's address.")]
AdapterServer = Annotated[str | None, typer.Option(envvar="CLOVEN_SERVER", help="Private LoRA: the adapter server's address.")]
Base = Annotated[
    str | None, typer.Option(envvar="CLOVEN_BASE", help="Private LoRA: the base model's directory, where it is not on the Hub.")
]
Pin = Annotated[str | None, typer.Option(envvar="CLOVEN_PIN", help="Private LoRA: the fingerprint that OUT/client must have.")]
Keys = Annotated[Path | None, typer.Option(envvar="CLOVEN_KEYS", help="This side's folder of keys; needed for tcp.")]
Exposed = Annotated[Path | None, typer.Option(envvar="CLOVEN_EXPOSED", help="SLIP: the trusted side's own copy of OUT/exposed.")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16: what the trusted process computes in.")]
Timeout = Annotated[float, typer.Option(help="Seconds that an answer of the other half may take.")]
InsecurePlainTcp = Annotated[bool, typer.Option("--insecure-plain-tcp", help="Use tcp without keys. INSECURE.")]
