"""cloven: run a large language model on hardware nobody has to trust.

    import cloven                                            # registers with transformers, imports neither it nor torch
    bundle = cloven.prepare_slip("MODEL", "OUT")             # OUT/trusted stays here, OUT/exposed goes to the worker
    model = AutoModelForCausalLM.from_pretrained("OUT/trusted")
    with cloven.attach(model, "ipc:///run/me/worker") as session:
        model.generate(…)

Public names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cloven import registration_hook

if TYPE_CHECKING:
    from cloven.audit.evaluate import evaluate as evaluate
    from cloven.bundle.bundle import Bundle as Bundle
    from cloven.bundle.bundle import open_bundle as open_bundle
    from cloven.cluster.adapter_process import AdapterServerProcess as AdapterServerProcess
    from cloven.cluster.enclave_process import EnclaveProcess as EnclaveProcess
    from cloven.cluster.worker_process import WorkerProcess as WorkerProcess
    from cloven.errors import ClovenError as ClovenError
    from cloven.kv_shield.config import KvShieldConfig as KvShieldConfig
    from cloven.kv_shield.prepare import prepare_kv_shield as prepare_kv_shield
    from cloven.model.attach import attach as attach
    from cloven.model.registration import ClovenConfig as ClovenConfig
    from cloven.model.runtime import Session as Session
    from cloven.private_lora.config import PrivateLoraConfig as PrivateLoraConfig
    from cloven.private_lora.prepare import prepare_private_lora as prepare_private_lora
    from cloven.private_lora.session import adapt as adapt
    from cloven.slip.config import SlipConfig as SlipConfig
    from cloven.slip.prepare import prepare_slip as prepare_slip
    from cloven.wire.keys import generate_keys as generate_keys
    from cloven.worker.service import Worker as Worker
    from cloven.zoo.demo import demo_adapter_path as demo_adapter_path
    from cloven.zoo.demo import demo_model_path as demo_model_path

if sys.platform == "win32":
    raise ImportError("cloven does not run on Windows: use Linux (or WSL)")

_PUBLIC = {
    "AdapterServerProcess": "cloven.cluster.adapter_process",
    "Bundle": "cloven.bundle.bundle",
    "ClovenConfig": "cloven.model.registration",
    "ClovenError": "cloven.errors",
    "EnclaveProcess": "cloven.cluster.enclave_process",
    "KvShieldConfig": "cloven.kv_shield.config",
    "PrivateLoraConfig": "cloven.private_lora.config",
    "Session": "cloven.model.runtime",
    "SlipConfig": "cloven.slip.config",
    "Worker": "cloven.worker.service",
    "WorkerProcess": "cloven.cluster.worker_process",
    "adapt": "cloven.private_lora.session",
    "attach": "cloven.model.attach",
    "demo_adapter_path": "cloven.zoo.demo",
    "demo_model_path": "cloven.zoo.demo",
    "evaluate": "cloven.audit.evaluate",
    "generate_keys": "cloven.wire.keys",
    "open_bundle": "cloven.bundle.bundle",
    "prepare_kv_shield": "cloven.kv_shield.prepare",
    "prepare_private_lora": "cloven.private_lora.prepare",
    "prepare_slip": "cloven.slip.prepare",
}
__all__ = sorted(_PUBLIC)

try:
    __version__ = version("cloven")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cloven' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


registration_hook.install()
