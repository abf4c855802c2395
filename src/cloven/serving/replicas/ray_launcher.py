"""Replicas as Ray actors: one process each, which Ray starts wherever the zone has room, and tells of when it has ended."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import Any

from cloven.errors import ClovenError, RunError
from cloven.serving.replicas.actor import Given, Replica, Told
from cloven.serving.replicas.launching import Started
from cloven.serving.replicas.pinned_tls import Identity

_START_SECONDS = 300.0  # to load the model; a node may have to be started first
_STOP_SECONDS = 15.0


class RayLauncher:
    """Starts replicas.

    Args:
        ray: the module, connected: see `zone`.
        given: what every replica is told.
        identity: the front's, whose certificate is in `given`.
        here: on this machine only: a pad store belongs to one machine.
    """

    def __init__(self, ray: Any, given: Given, identity: Identity, here: bool) -> None:
        self._ray, self._given, self._identity = ray, given, identity
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 4}
        if here:
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        self._actor = ray.remote(**options)(Replica)

    def start(self) -> Started:
        """See `Launcher`."""
        actor = self._actor.remote()
        try:
            told: Told = self._ray.get(actor.start.remote(self._given), timeout=_START_SECONDS)
        except self._ray.exceptions.RayTaskError as error:
            self._kill(actor)
            if isinstance(error.cause, ClovenError):
                raise error.cause from error
            raise RunError(f"a replica could not be started: {type(error.cause).__name__}") from error
        except self._ray.exceptions.RayError as error:
            self._kill(actor)
            raise RunError(
                f"a replica could not be started on Ray ({type(error).__name__}): each needs a free core, and memory for the model"
            ) from error
        host = f"[{told.host}]" if ":" in told.host else told.host
        ended: Future[Any] = actor.wait.remote().future()
        tls = self._identity.context(told.certificate, server=False)
        return Started(told.name, told.scheme, told.running, f"https://{host}:{told.port}", tls, ended, actor)

    def stop(self, started: Started) -> None:
        """See `Launcher`."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            if not started.ended.done():
                self._ray.get(started.handle.stop.remote(), timeout=_STOP_SECONDS)
        self._kill(started.handle)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it is gone, or Ray is
            self._ray.kill(actor)
