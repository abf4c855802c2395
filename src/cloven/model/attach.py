"""`cloven.attach`: connect a loaded model to its worker, its enclave or its adapter server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cloven.errors import BadInput
from cloven.model.registration import ClovenConfig, scheme_named
from cloven.model.runtime import RuntimeOptions, Session


def scheme_of(model: Any) -> str | None:
    """The name of the scheme that protects a loaded model; None: it is no split model."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    name = config.description["scheme"] if isinstance(config, ClovenConfig) else getattr(model, "cloven_scheme", None)
    return str(name) if name is not None else None


def attach(
    model: PreTrainedModel,
    address: str | Sequence[str],
    keys: str | Path | None = None,
    *,
    exposed: str | Path | None = None,
    **options: Any,
) -> Session:
    """Connect a model loaded from a bundle to its worker (SLIP), its enclave (KV-Shield) or its adapter server (private LoRA).

    Args:
        model: what `AutoModelForCausalLM.from_pretrained` returned for OUT/trusted (SLIP), OUT/exposed (KV-Shield) or OUT/client (private
            LoRA; for a base that was loaded from its own directory, see `cloven.adapt`).
        address: ipc://PATH on one host, tcp://HOST:PORT between hosts; for SLIP several, as a list (see `placement`).
        keys: the trusted side's folder of keys, made by `cloven keygen`; needed for tcp.
        exposed: the trusted side's own copy of OUT/exposed; the sibling of OUT/trusted if not given.
        options: `timeout` (seconds), `look_ahead` (rows of pads), `pad_bytes`, `pads` (a pad store), `on_empty`, `placement`, `pin`,
            `backend`, `insecure_…`; see `RuntimeOptions`.

    Returns:
        The session, a context manager with `statistics()` and `close()`. A session that the model had before is closed.

    Raises:
        BadInput: not a split model, or wrong settings.  PeerRefused, WorkerUnreachable, WorkerTimeout: the worker.
        ForeignBundle, TamperedBundle: the worker or the copy of exposed/ does not belong to this model.

    Guarantee: see the scheme's session: SLIP's worker receives one-time-padded integers only and a wrong answer is refused (≤ 2^-61 per
    session). Not hidden: the number, size and times of products.
    """
    scheme = scheme_of(model)
    if scheme is None:
        raise BadInput("this is no split model: load OUT/trusted of a bundle that `cloven prepare` made")
    if not isinstance(address, str):
        address = " ".join(address)
    if options.get("pads") is not None:
        options["pads"] = Path(options["pads"])
    settings = RuntimeOptions(address, Path(keys) if keys is not None else None, Path(exposed) if exposed is not None else None)
    try:
        settings = replace(settings, **options)
    except TypeError as error:
        raise BadInput(f"cloven.attach: unknown option among {', '.join(sorted(options))}") from error
    session = scheme_named(scheme).attach(model, settings)
    assert isinstance(session, Session)
    return session
