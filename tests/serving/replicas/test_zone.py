"""Where Ray may run. What needs a Ray that runs is in `test_serve`, which shares one."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from cloven.errors import PeerRefused, RunError
from cloven.serving.replicas import zone as zone_module
from cloven.serving.replicas.zone import zone


class NoRay:
    """Stands for the module."""

    def __init__(self) -> None:
        self.left = False

    def shutdown(self) -> None:
        """See `ray.shutdown`."""
        self.left = True


def started(monkeypatch: pytest.MonkeyPatch) -> tuple[NoRay, list[tuple[int, dict[str, str]]]]:
    ray, seen = NoRay(), []

    def start(processes: int) -> Any:
        seen.append((processes, dict(os.environ)))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does, in its way
        return ray

    monkeypatch.setattr(zone_module, "start_ray", start)
    return ray, seen


@pytest.mark.parametrize("address", [None, "", "local"])
def test_a_ray_of_our_own_is_closed(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token and a folder for this once, gone afterwards; the handler of SIGTERM is the one from before."""
    ray, seen = started(monkeypatch)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "somebody's")
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    tokens = []
    for _ in range(2):
        with zone(3, insecure_ray_cluster=False) as given:
            assert given is ray and signal.getsignal(signal.SIGTERM) == handler
            processes, environment = seen[-1]
            folder, token = Path(environment["RAY_TMPDIR"]), Path(environment["RAY_AUTH_TOKEN_PATH"])
            assert processes == 3 and environment["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in environment
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(token.stat().st_mode) == 0o600
            assert token.parent == folder and len(str(folder)) < 30
            tokens.append(token.read_text())
        assert not folder.exists() and ray.left
    assert len(set(tokens)) == 2 and all(len(token) == 64 for token in tokens)
    assert dict(os.environ) == before


def test_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = started(monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    with (
        pytest.raises(PeerRefused, match=r"RAY_ADDRESS names a Ray cluster: .*--insecure-ray-cluster"),
        zone(2, insecure_ray_cluster=False),
    ):
        pass
    assert not seen


def test_a_cluster_that_is_vouched_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ray, seen = started(monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with zone(2, insecure_ray_cluster=True) as given:
            assert given is ray and seen[0][1] == dict(os.environ)  # its own settings
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ray.left and [line for line in caplog.messages if line.startswith("INSECURE: replicas run on the Ray cluster")]


def test_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_processes: int) -> Any:
        raise RunError("no")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(zone_module, "start_ray", start)
    before = dict(os.environ)
    with pytest.raises(RunError, match="no"), zone(2, insecure_ray_cluster=False):
        pass
    assert dict(os.environ) == before
