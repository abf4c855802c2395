from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch
import zmq

from cloven.demo import checks
from cloven.demo.checks import run_checks
from cloven.errors import RunError
from cloven.field.products import Float64


def by_name() -> dict[str, checks.Check]:
    return {check.name: check for check in run_checks()}


def test_all_is_well_here() -> None:
    found = by_name()
    assert list(found) == ["versions", "platform", "exact product on cpu", "encryption", "sockets", "shared memory"]
    assert all(check.ok for check in found.values())
    assert "torch" in found["versions"].result and "self-check passed" in found["exact product on cpu"].result


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        if name == "pyzmq":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(checks, "version", missing)
    check = by_name()["versions"]
    assert not check.ok and check.result == "pyzmq is missing" and check.advice == "pip install pyzmq"


def test_no_exact_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: str) -> None:
        raise RunError(f"no exact product on device {device}")

    monkeypatch.setattr(checks, "select_backend", none)
    check = by_name()["exact product on cpu"]
    assert not check.ok and "another device" in check.advice


def test_a_slow_product_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "select_backend", lambda device: Float64(torch.device(device)))
    check = by_name()["exact product on cpu"]
    assert check.ok and "slow" in check.advice and "VNNI" in check.advice


def test_every_accelerator_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(checks, "select_backend", lambda device: Float64(torch.device("cpu")))
    assert {"exact product on cuda:0", "exact product on cuda:1"} <= set(by_name())


def test_zeromq_without_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda name: False)
    check = by_name()["encryption"]
    assert not check.ok and "pyzmq" in check.advice


def test_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.platform, "system", lambda: "Darwin")
    check = by_name()["platform"]
    assert check.ok and "untested" in check.advice


def test_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "lanes_available", lambda: False)
    check = by_name()["shared memory"]
    assert check.ok and "sockets carry everything" in check.result and "compiler" in check.advice
