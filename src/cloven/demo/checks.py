"""What `cloven doctor` checks."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import zmq

import cloven
from cloven.errors import BadInput, ClovenError
from cloven.field.native.library import KERNELS, load_kernels
from cloven.field.products import Float64
from cloven.field.selection import select_backend
from cloven.kv_shield.enclave_step import library
from cloven.wire.admission import Admission
from cloven.wire.lane import lanes_available

_PACKAGES = ("torch", "transformers", "safetensors", "pyzmq", "cryptography")


@dataclass(frozen=True)
class Check:
    """One line of the report; `advice` says what to do."""

    name: str
    ok: bool
    result: str
    advice: str = ""


def run_checks() -> list[Check]:
    """All checks, in order."""
    return [_versions(), _platform(), *_products(), _curve(), _ipc(), _lanes()]


def _versions() -> Check:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return Check("versions", False, f"{package} is missing", f"pip install {package}")
    return Check("versions", True, f"cloven {cloven.__version__}, Python {platform.python_version()}, " + ", ".join(found))


def _platform() -> Check:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64"):
        return Check("platform", True, system)
    return Check("platform", True, system, "untested here: Linux on x86-64 or aarch64 is what is tested")


def _products() -> list[Check]:
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    checks = []
    for device in devices:
        try:
            backend = select_backend(device)
        except ClovenError as error:
            advice = "" if isinstance(error, BadInput) else "use another device, or another build of PyTorch"
            checks.append(Check(f"exact product on {device}", False, str(error), advice))
            continue
        advice = ""
        if Float64.name in backend.name:
            advice = "slow: torch._int_mm is not exact here (a CPU without VNNI); another machine is faster"
        elif device == "cpu" and load_kernels() is not None and not backend.name.startswith("native"):
            advice = f"the C++ kernels are there, but {KERNELS} switches them off"
        elif device == "cpu" and load_kernels() is None:
            advice = "twice as fast for single tokens with the C++ kernels: install a compiler (g++), then reinstall cloven"
        checks.append(Check(f"exact product on {device}", True, f"{backend.name}, self-check passed", advice))
    return checks


def _curve() -> Check:
    if zmq.has("curve"):
        return Check("encryption", True, f"ZeroMQ {zmq.zmq_version()} with CURVE")
    return Check(
        "encryption", False, f"ZeroMQ {zmq.zmq_version()} without CURVE", "install the pyzmq wheel: pip install --force-reinstall pyzmq"
    )


def _ipc() -> Check:
    """A round trip over an ipc socket with admission in place."""
    with tempfile.TemporaryDirectory(prefix="cloven-") as folder:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        admission = Admission(context, None)
        server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        server.linger = client.linger = 0
        try:
            admission.guard(server, None)
            admission.start()
            server.bind(f"ipc://{folder}/doctor")
            client.connect(f"ipc://{folder}/doctor")
            client.send(b"ping")
            arrived = bool(server.poll(3000)) and server.recv_multipart()[-1] == b"ping"
        except zmq.ZMQError as error:
            return Check("sockets", False, f"ipc sockets do not work: {error}", "is the temporary folder on a local disk? set TMPDIR")
        finally:
            server.close()
            client.close()
            admission.stop()
            context.destroy(linger=0)
    return Check(
        "sockets", arrived, "ipc round trip" if arrived else "no ipc round trip", "" if arrived else "check TMPDIR and its permissions"
    )


def _lanes() -> Check:
    """Whether processes of one host exchange messages through shared memory, and the enclave serves single tokens in C++."""
    if not lanes_available():
        return Check("shared memory", True, "not used: sockets carry everything", "slower on one host: needs Linux and a compiler (g++)")
    return Check("shared memory", True, "used between processes of one host" + (", with the enclave in C++" if library() else ""))
