"""Private LoRA for the tests: tiny bases, random adapters that PEFT wrote, bundles prepared once per run, servers in threads."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import cloven
from cloven.private_lora.config import PrivateLoraConfig
from cloven.private_lora.ledger import Account
from cloven.private_lora.manifest import ClientManifest, ServerManifest
from cloven.private_lora.prepare import LEDGER_FILE, prepare_private_lora
from cloven.private_lora.server import AdapterServer
from cloven.private_lora.session import LoraSession
from cloven.private_lora.witness import read_witness
from cloven.wire import server as server_module
from cloven.zoo.tiny import tiny_model
from tests.split_models import scratch, tiny, tiny_folder

FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt2", "gpt-neox", "glm")
VOCABULARY = 97
RANK = 4
BUDGET = 10_000
for _name in ("CLOVEN_SERVER", "CLOVEN_BASE", "CLOVEN_PIN"):
    os.environ.pop(_name, None)  # settings of the person who runs the tests


@contextlib.contextmanager
def peft() -> Iterator[Any]:
    """The module `peft`, which warns of what transformers deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft as module

        yield module


def peft_adapter(folder: Path, family: str = "llama", seed: int = 0, **settings: Any) -> Any:
    """A random adapter (B is not zero) made and saved by PEFT: the model that PEFT adapted; `folder` is its directory."""
    with peft() as module:
        options = {"r": RANK, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
        base, config = tiny_model(family), module.LoraConfig(task_type="CAUSAL_LM", **options)
        torch.manual_seed(1000 + seed)
        adapted = module.get_peft_model(base, config)
        adapted.save_pretrained(folder)
        return adapted.eval()


def adapter_folder(family: str = "llama", seed: int = 0) -> Path:
    """The PEFT directory of a random adapter for all linears of a tiny model; not to be changed on disk."""
    folder = scratch() / f"adapter-{family}-{seed}"
    if not folder.exists():
        peft_adapter(folder, family, seed)
    return folder


def loaded_by_peft(folder: Path, family: str = "llama") -> Any:
    """PEFT's model of an adapter, not merged."""
    with peft() as module:
        return module.PeftModel.from_pretrained(tiny_model(family), folder).eval()


@functools.cache
def merged(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """The base with the adapter merged into it by PEFT, float32; not to be changed."""
    with peft():
        return loaded_by_peft(adapter_folder(family, seed), family).merge_and_unload().eval()


def lora_bundle(family: str = "llama", bits: int = 16, hint: str = "lwe", seed: int = 0) -> Path:
    """OUT of a tiny model's adapter; not to be changed on disk, and not to be served: see `copied`."""
    out = scratch() / f"lora-{family}-{bits}-{hint}-{seed}"
    if out.exists():
        return out
    with patch.dict(os.environ, {"CLOVEN_STATE": str(_kept_state(out))}):
        config = PrivateLoraConfig(BUDGET, bits=bits, hint=hint)
        prepare_private_lora(tiny_folder(family), adapter_folder(family, seed), out, config)
    return out


def _kept_state(out: Path) -> Path:
    return scratch() / f"state-{out.name}"


def copied(out: Path, where: Path) -> Path:
    """A bundle of `lora_bundle` with its witness, for this test to serve or to damage: OUT/client and OUT/server below `where`."""
    shutil.copytree(out, where)
    adapter = ServerManifest.read(where / "server").adapter
    here = Path(os.environ["CLOVEN_STATE"]) / "ledgers"
    here.mkdir(parents=True, exist_ok=True)
    text = (_kept_state(out) / "ledgers" / f"{adapter}.json").read_text(encoding="utf-8")
    (here / f"{adapter}.json").write_text(text.replace(str(out), str(where)), encoding="utf-8")
    witness = read_witness(adapter)
    assert witness is not None and witness.path == str(where / "server" / LEDGER_FILE)
    return where


def own_bundle(where: Path, family: str = "llama", budget: int = BUDGET, share: int | None = None, seed: int = 0, **more: Any) -> Path:
    """OUT prepared for this test."""
    config = PrivateLoraConfig(budget, share, **{name: more.pop(name) for name in ("bits", "hint") if name in more})
    prepare_private_lora(tiny_folder(family), adapter_folder(family, seed), where, config, **more)
    return where


class RecordingServer(AdapterServer):
    """Keeps what it receives and what it sends."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.received: list[list[bytes]] = []
        self.sent: list[list[bytes]] = []
        self.peers: list[str] = []
        super().__init__(*args, **options)
        for adapter in self.adapters.values():
            adapter.lane_answers = None  # C++ keeps nothing

    def answer(self, frames: list[Any], peer: str) -> list[Any]:
        """See `Server.answer`."""
        self.received.append([bytes(frame) for frame in frames])
        self.peers.append(peer)
        answer = super().answer(frames, peer)
        self.sent.append([bytes(frame) for frame in answer])
        return answer


@contextlib.contextmanager
def adapter_server(folder: Path, address: str, kind: type[AdapterServer] = RecordingServer, **options: Any) -> Iterator[Any]:
    """An adapter server in a thread of this process, which ends without delay."""
    server = kind([folder], address, **options)
    thread = threading.Thread(target=server.serve, name="adapter-server")
    with patch.object(server_module, "_POLL_MILLISECONDS", 5):
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(10)
            assert not thread.is_alive()


def base_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """The base, loaded anew from its directory."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype=dtype)


def connect(out: Path, address: str, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, LoraSession]:
    """A freshly loaded base, adapted, and its session; without masks ahead of time."""
    model = base_model(family, dtype)
    session = cloven.adapt(model, out / "client", address, **{"look_ahead": 0, "timeout": 20.0, **options})
    assert isinstance(session, LoraSession)
    return model, session


@dataclass
class Adapted:
    """An adapted model, its session, its server, and the model that PEFT merged."""

    model: Any
    session: LoraSession
    server: RecordingServer
    merged: PreTrainedModel
    out: Path
    address: str

    def charged(self) -> int:
        """Rows that the ledger counts for the first group, by all clients."""
        return charged(self.server)


def ledger_of(server: AdapterServer) -> Any:
    """The ledger of a server of one bundle."""
    (adapter,) = server.adapters.values()
    return adapter.ledger


def charged(server: AdapterServer, group: int = 0) -> int:
    """Rows that a server's ledger counts for a group."""
    (adapter,) = server.adapters.values()
    accounts: list[Account] = adapter.ledger.accounts()
    return sum(account.rows for account in accounts if account.matrix == adapter.manifest.groups[group].name.split("+")[0])


@contextlib.contextmanager
def adapted(
    where: Path,
    family: str = "llama",
    bits: int = 16,
    hint: str = "lwe",
    dtype: torch.dtype = torch.float32,
    kind: type[AdapterServer] = RecordingServer,
    **options: Any,
) -> Iterator[Adapted]:
    """A tiny model, adapted, with its server in a thread; `where` gets the bundle."""
    out = copied(lora_bundle(family, bits, hint), where / "out")
    with tempfile.TemporaryDirectory(prefix="c-") as folder, adapter_server(out / "server", f"ipc://{folder}/s", kind) as server:
        model, session = connect(out, server._address, family, dtype, **options)
        with session:
            yield Adapted(model, session, server, merged(family), out, server._address)


def tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def client_manifest(out: Path) -> ClientManifest:
    """The manifest of OUT/client."""
    return ClientManifest.read(out / "client")


def ids_of(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without the pad, int64 [batch, length]."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain(family: str = "llama") -> PreTrainedModel:
    """The base without the adapter; not to be changed."""
    return tiny(family)
