"""`cloven serve --engine ray`: the zone, the first replicas, the front."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cloven.errors import BadInput, ClovenError
from cloven.model.runtime import RuntimeOptions
from cloven.serving.half import Half
from cloven.serving.loading import LoadOptions
from cloven.serving.options import ServeOptions
from cloven.serving.replicas.actor import Given
from cloven.serving.replicas.fleet import Fleet
from cloven.serving.replicas.front import Front
from cloven.serving.replicas.launching import Launcher, Started
from cloven.serving.replicas.pinned_tls import Identity
from cloven.serving.replicas.ray_launcher import RayLauncher
from cloven.serving.replicas.zone import zone
from cloven.telemetry import logger

MOST = 64


@contextmanager
def replicated(
    half: Half,
    how: LoadOptions,
    runtime: RuntimeOptions,
    serving: ServeOptions,
    replicas: int,
    harden: Callable[[], None],
    insecure_ray_cluster: bool = False,
) -> Iterator[tuple[str, Front]]:
    """Replicas of a served model, each a trusted process with a session of its own, and the front that shares requests out to them.

    Args:
        half, how, runtime, serving: as for an endpoint without replicas.
        replicas: how many.
        harden: called first in every replica.
        insecure_ray_cluster: see `zone`.

    Yields:
        The model's name, and the front, whose application looks after the replicas.

    Raises:
        BadInput: how many.  ClovenError: a replica cannot be started; none is left then.

    Guarantee: a pad is used by one replica alone: without a store each has a key of its own, from a store each draws blocks of numbers that
    nobody else gets. Requests do not pass through Ray. Not hidden: anything from whoever controls Ray or a machine of the zone.
    """
    if not 1 <= replicas <= MOST:
        raise BadInput(f"replicas {replicas}: give 1 to {MOST}")
    identity = Identity()
    with zone(replicas, insecure_ray_cluster) as ray:
        given = Given(
            replace(half, folder=half.folder.absolute()),
            replace(how, chat_template=_absolute(how.chat_template)),
            replace(runtime, keys=_absolute(runtime.keys), exposed=_absolute(runtime.exposed), pads=_absolute(runtime.pads)),
            serving,
            identity.certificate,
            replicas,
            harden,
            logger.getEffectiveLevel(),
        )
        launcher = RayLauncher(ray, given, identity, here=runtime.pads is not None)
        first = _started(launcher, replicas)
        yield first[0].name, Front(first[0].name, Fleet(launcher, first, serving.max_queue), serving)


def _started(launcher: Launcher, replicas: int) -> list[Started]:
    """All of them, or none and the first error."""
    pool = ThreadPoolExecutor(replicas)
    try:
        jobs = [pool.submit(launcher.start) for _ in range(replicas)]
        failures = [error for job in jobs if (error := job.exception()) is not None]
        if not failures:
            return [job.result() for job in jobs]
        list(pool.map(launcher.stop, [job.result() for job in jobs if job.exception() is None]))
    finally:
        pool.shutdown(wait=False)  # who is interrupted does not wait: Ray ends what it has started
    raise next((error for error in failures if isinstance(error, ClovenError)), failures[0])


def _absolute(path: Path | None) -> Path | None:
    return path.absolute() if path is not None else None
