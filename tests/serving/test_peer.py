from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cloven.model.runtime import RuntimeOptions
from cloven.serving import peer as peer_module
from cloven.serving.half import open_half
from cloven.serving.peer import peer_is_there
from tests.kv_bundles import enclave, kv_bundle
from tests.split_models import tiny_bundle, worker_thread


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "_PROBE_SECONDS", 0.3)


def asked(address: str, placement: str = "replicas", family: str = "llama") -> bool:
    half = open_half(tiny_bundle(family).trusted, address, None, None)
    return peer_is_there(half, RuntimeOptions(address, placement=placement))


def test_a_worker(socket_folder: Path) -> None:
    nobody = f"ipc://{socket_folder}/nobody"
    assert not asked(nobody) and not asked("ipc:///no/such/folder/w")
    with worker_thread(tiny_bundle("llama")) as address:
        assert asked(address)
        assert asked(f"{nobody} {address}") and asked(f"{nobody},{address}")  # replicas: one of them is enough
        assert not asked(f"{nobody} {address}", "layers")  # parts: all of them are needed
        assert asked(f"{nobody},{address}", "layers")
    assert not asked(address)


def test_somebody_elses_worker(caplog: pytest.LogCaptureFixture) -> None:
    with worker_thread(tiny_bundle("qwen2")) as address, caplog.at_level(logging.WARNING, "cloven"):
        assert not asked(address)
    assert "is not who is needed" in caplog.text


def test_an_enclave() -> None:
    out = kv_bundle("llama", "session")
    with enclave(out / "trusted") as (address, _):
        half = open_half(out / "exposed", None, address, None)
        assert peer_is_there(half, RuntimeOptions(address))
    assert not peer_is_there(half, RuntimeOptions(address))
