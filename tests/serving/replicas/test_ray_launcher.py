"""What a launcher makes of Ray's answers; with a real Ray see `test_serve`."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from cloven.errors import RunError, StoreUnusable
from cloven.serving.replicas.actor import Told
from cloven.serving.replicas.pinned_tls import Identity
from cloven.serving.replicas.ray_launcher import _START_SECONDS, _STOP_SECONDS, RayLauncher


class RayError(Exception):
    """Ray's."""


class RayTaskError(RayError):
    """Ray's."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class FakeRay:
    """`answer` is what an actor's method comes to."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, answer: Any) -> None:
        self.answer, self.killed = answer, 0
        self.options: dict[str, Any] = {}
        self.timeouts: list[float] = []
        self.ended: Future[None] = Future()
        self.util = SimpleNamespace(scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft)))

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "this node")

    def remote(self, **options: Any) -> Any:
        self.options = options
        method = SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: self.ended))
        return lambda _kind: SimpleNamespace(remote=lambda: SimpleNamespace(start=method, wait=method, stop=method))

    def get(self, _reference: Any, timeout: float) -> Any:
        self.timeouts.append(timeout)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def kill(self, _actor: Any) -> None:
        self.killed += 1
        raise RayError("it is gone")


def launcher(ray: FakeRay, here: bool = False) -> RayLauncher:
    return RayLauncher(ray, None, Identity(), here)  # type: ignore[arg-type]


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "https://127.0.0.1:7"), ("fd00::1", "https://[fd00::1]:7")])
def test_a_start_and_an_end(host: str, url: str) -> None:
    ray = FakeRay(Told("bard", "slip", 4, host, 7, Identity().certificate))
    made = launcher(ray)
    started = made.start()
    assert (started.name, started.scheme, started.running, started.url) == ("bard", "slip", 4, url)
    assert started.tls is not None and not started.ended.done() and not ray.killed
    assert ray.options["max_restarts"] == 0 and ray.options["max_task_retries"] == 0  # another one is another session
    ray.answer = None
    made.stop(started)
    assert ray.killed == 1 and ray.timeouts == [_START_SECONDS, _STOP_SECONDS]
    ray.ended.set_result(None)
    made.stop(started)  # of one that has ended: it is not asked
    assert len(ray.timeouts) == 2


def test_one_that_does_not_answer_is_killed() -> None:
    ray = FakeRay(Told("bard", "slip", 4, "127.0.0.1", 7, Identity().certificate))
    made = launcher(ray)
    started = made.start()
    ray.answer = RayError("a timeout")
    made.stop(started)
    assert ray.killed == 1


def test_a_store_keeps_them_here() -> None:
    assert "scheduling_strategy" not in (ray := FakeRay(None)).options and launcher(ray) and "scheduling_strategy" not in ray.options
    assert launcher(ray, here=True) and ray.options["scheduling_strategy"] == ("this node", False)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RayTaskError(StoreUnusable("a copy")), StoreUnusable, "^a copy$"),
        (RayTaskError(ValueError("with a prompt")), RunError, "^a replica could not be started: ValueError$"),
        (
            RayError("of Ray"),
            RunError,
            r"^a replica could not be started on Ray \(RayError\): each needs a free core, and memory for the model$",
        ),
    ],
)
def test_what_goes_wrong(error: Exception, kind: type[Exception], text: str) -> None:
    ray = FakeRay(error)
    with pytest.raises(kind, match=text):
        launcher(ray).start()
    assert ray.killed == 1
