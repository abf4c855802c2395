"""Ray for trusted processes: its own, closed to everybody else, or a cluster that the operator vouches for.

Whoever can talk to Ray runs code as its user, and the processes here hold secrets. A Ray that is started here listens on localhost, asks
for a token that is drawn for it, and keeps its files and sockets in a folder of mode 0700. Between machines Ray neither encrypts nor, by
itself, authenticates: a cluster (RAY_ADDRESS) is refused unless the operator says that its network belongs to the zone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloven.engine.ray import start_ray
from cloven.errors import PeerRefused
from cloven.telemetry import logger

CLUSTER_BANNER = (
    "INSECURE: replicas run on the Ray cluster at RAY_ADDRESS. Whoever reaches its ports runs code in processes that hold the secret half: "
    "its machines and its network must belong to one zone of trust."
)
_OWN = (None, "", "local")
_SETTINGS = ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextlib.contextmanager
def zone(replicas: int, insecure_ray_cluster: bool) -> Iterator[Any]:
    """The `ray` module, connected; at the end it is left, and a Ray of our own ended.

    Args:
        replicas: processes that it must have room for.
        insecure_ray_cluster: accept the cluster at RAY_ADDRESS.

    Raises:
        PeerRefused: RAY_ADDRESS names a cluster, and nobody has said that it is trusted.
        BadInput: Ray is not installed.  RunError: it cannot be reached or started.
    """
    own = os.environ.get("RAY_ADDRESS") in _OWN
    if not own and not insecure_ray_cluster:
        raise PeerRefused(
            "RAY_ADDRESS names a Ray cluster: whoever reaches its ports could read the secret half. Unset it, and replicas run on this "
            "machine; or give --insecure-ray-cluster, if all its machines and its network are in your zone of trust"
        )
    if not own:
        logger.warning(CLUSTER_BANNER)
    with _closed_folder() if own else contextlib.nullcontext():
        with _kept_signals():
            ray = start_ray(replicas)
        try:
            yield ray
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _closed_folder() -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in _SETTINGS}
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))  # mode 0700; short: Ray's sockets are in it
    try:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(RAY_TMPDIR=str(folder), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Ray sets a handler of its own for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)
