"""Workers as Ray actors, inside the untrusted zone: one process each, wherever the cluster has room. Ray never crosses the trust boundary:
the trusted side talks to the workers' own addresses, as to any other worker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cloven.engine.ray import start_ray
from cloven.errors import BadInput, ClovenError, RunError

_START_SECONDS = 120.0


class _Actor:
    """One worker; Ray makes an instance in a process of its own. What goes wrong in `__init__` Ray reports as text only."""

    def start(self, exposed: str, address: str, keys: str | None, device: str, insecure_plain_tcp: bool, part: str) -> str:
        """Serve; the node's address, as Ray knows it."""
        import threading

        import ray

        from cloven.wire.keys import worker_keys
        from cloven.worker.service import Worker

        worker = Worker(
            Path(exposed),
            address,
            keys=worker_keys(Path(keys)) if keys is not None else None,
            device=device,
            insecure_plain_tcp=insecure_plain_tcp,
            part=part,
        )
        threading.Thread(target=worker.serve, name="cloven-worker", daemon=True).start()
        return str(ray.util.get_node_ip_address())


class RayWorkers:
    """Several workers of one exposed half as Ray actors; a context manager.

    Args:
        exposed: OUT/exposed, at the same path on every node.
        listen: the first worker's address: tcp://*:PORT (the next ones get the next ports), or ipc://PATH (with a number appended).
        replicas: how many.
        placement: "" (all hold everything), "layers" or "rows" (each holds its part).
        keys, device, insecure_plain_tcp: see `cloven worker`.
    """

    def __init__(
        self,
        exposed: Path,
        listen: str,
        replicas: int,
        *,
        placement: str = "",
        keys: Path | None = None,
        device: str = "cpu",
        insecure_plain_tcp: bool = False,
    ) -> None:
        places = [_address(listen, index) for index in range(replicas)]
        self._ray = start_ray()
        self.addresses: list[str] = []
        self._actors: list[Any] = []
        options = {"num_cpus": 1} | ({"num_gpus": 1} if device.startswith("cuda") else {})
        actor = self._ray.remote(**options)(_Actor)
        started = []
        for index, place in enumerate(places):
            part = f"{placement}:{index + 1}/{replicas}" if placement else ""
            self._actors.append(actor.remote())
            given = (str(exposed.absolute()), place, str(keys.absolute()) if keys else None, device, insecure_plain_tcp, part)
            started.append(self._actors[-1].start.remote(*given))
        try:
            hosts = self._ray.get(started, timeout=_START_SECONDS)
        except self._ray.exceptions.RayTaskError as error:
            self.stop()
            if isinstance(error.cause, ClovenError):
                raise error.cause from error
            raise RunError(f"a worker could not be started on Ray: {type(error.cause).__name__}") from error
        except self._ray.exceptions.RayError as error:
            self.stop()
            raise RunError(
                f"{replicas} workers could not be started on Ray ({type(error).__name__}): each needs a core of its own"
                + (" and a GPU" if device.startswith("cuda") else "")
            ) from error
        self.addresses = [place.replace("*", host).replace("0.0.0.0", host) for place, host in zip(places, hosts, strict=True)]  # noqa: S104

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all workers."""
        for one in self._actors:
            self._ray.kill(one)
        self._actors.clear()


def _address(listen: str, index: int) -> str:
    if listen.startswith("ipc://"):
        return f"{listen}-{index + 1}"
    match = re.fullmatch(r"(tcp://.*):([0-9]{1,5})", listen)
    if match is None:
        raise BadInput(f"{listen!r} is no address: use ipc://PATH or tcp://HOST:PORT")
    return f"{match[1]}:{int(match[2]) + index}"
