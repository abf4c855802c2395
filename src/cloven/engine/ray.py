"""A Ray cluster inside one zone of trust: `pip install 'cloven[ray]'`.

Ray's ports mean code execution and its object store is plaintext, so Ray never crosses the trust boundary, a cluster that is started
here listens on localhost only, and tasks are given paths and numbers, never arrays or keys. RAY_ADDRESS names a cluster of your own: all
its machines must belong to the zone and see the same files at the same paths.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cloven.errors import BadInput, ClovenError, RunError

J = TypeVar("J")
_LOCALHOST = "127.0.0.1"
_STORE_BYTES = 80 * 2**20  # of the object store, which is not used: nearly the least that Ray takes
_CONNECT_SECONDS = 10


def start_ray(processes: int | None = None) -> Any:
    """The `ray` module, connected: to RAY_ADDRESS, or to a cluster of its own on localhost.

    Args:
        processes: of a cluster of its own; None: one per core.

    Raises:
        BadInput: Ray is not installed.  RunError: it cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    own = address in (None, "", "local")
    if own:  # Ray replaces 127.0.0.1 by an address that others reach, and then listens everywhere, unless this says that it is alone
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own, 15, starves what it runs beside anything that is busy
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise BadInput("the ray engine needs Ray: pip install 'cloven[ray]'") from error
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if own:
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": _LOCALHOST}
        options |= {"num_cpus": processes, "object_store_memory": _STORE_BYTES}
    try:
        if address and not own:
            _require_listener(address)
        ray.init(**options)
    except Exception as error:  # Ray raises many kinds
        where = "a local Ray cluster cannot be started" if own else f"the Ray cluster at RAY_ADDRESS={address} cannot be reached"
        raise RunError(f"{where} ({type(error).__name__}): start it with `ray start --head`, or take another --engine") from error
    if own and ray.util.get_node_ip_address() != _LOCALHOST:
        ray.shutdown()
        raise RunError("Ray does not stay on localhost: it was imported before cloven started it; use a fresh process, or another --engine")
    return ray


def _require_listener(address: str) -> None:
    """Ray ends the whole process when nobody listens at an address."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


class RayEngine:
    """Jobs as Ray tasks of one core each.

    Args:
        bytes_per_job: memory that a job may need; Ray places the tasks by it.
    """

    def __init__(self, bytes_per_job: int) -> None:
        self._ray = start_ray()
        self._bytes = bytes_per_job

    def run(self, task: Callable[[J], None], jobs: Sequence[J]) -> Iterator[J]:
        """See `Engine`."""
        ray = self._ray
        total = float(ray.cluster_resources().get("memory", self._bytes))
        remote = ray.remote(num_cpus=1, memory=int(min(self._bytes, total)), max_retries=2)(_alone)
        running = {remote.remote(task, job): job for job in jobs}
        try:
            while running:
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    job = running.pop(reference)
                    ray.get(reference)
                    yield job
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ClovenError):
                raise cause from error
            raise RunError(f"a job failed on Ray: {type(cause).__name__}") from error
        except ray.exceptions.RayError as error:
            raise RunError(f"Ray lost a job ({type(error).__name__}): run the same command again to go on") from error
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _alone(task: Callable[[J], None], job: J) -> None:
    from cloven.engine.engine import one_thread

    with one_thread():
        task(job)
