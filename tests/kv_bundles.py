"""KV-Shield for the tests: bundles prepared once per run, enclaves in threads, loaded models, and what their caches hold."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import cloven
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.enclave import Enclave
from cloven.kv_shield.keys import SessionKeys
from cloven.kv_shield.manifest import KEYS_FILE
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.kv_shield.rotary import Rotary
from cloven.kv_shield.service import EnclaveServer
from cloven.kv_shield.session import KvSession
from cloven.kv_shield.shapes import AttentionShape
from cloven.wire import server as server_module
from tests.split_models import scratch, tiny

FAMILIES = ("llama", "llama-mha", "llama-tied", "qwen2", "qwen3", "mistral", "gemma", "phi3", "glm", "gpt2")
MODES = ("permute", "session")
VOCABULARY = 97
FLOAT32_TOLERANCE = 1e-4  # relative to the largest logit
os.environ.pop("CLOVEN_ENCLAVE", None)  # a setting of the person who runs the tests

SHAPE = AttentionShape("a", 4, 2, 12, ("q_proj", "k_proj", "v_proj"), "o_proj", True, None)
NORMED = replace(SHAPE, norm_epsilon=1e-6)


@functools.cache
def kv_bundle(family: str, mode: str) -> Path:
    """OUT of a tiny model; not to be changed on disk."""
    out = scratch() / f"kv-{family}-{mode}"
    prepare_kv_shield(tiny(family), out, KvShieldConfig(mode))
    return out


@functools.cache
def stored_keys(family: str, mode: str = "permute") -> dict[str, Tensor]:
    """The tensors of OUT/trusted/keys.safetensors."""
    return tensors(kv_bundle(family, mode) / "trusted" / KEYS_FILE)


def tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def by_sequence(keys: SessionKeys) -> list[SessionKeys]:
    """The keys of a layer, each sequence's apart."""
    return [SessionKeys(*both) for both in zip(keys.kv, keys.inverse, strict=True)]


class RecordingServer(EnclaveServer):
    """Keeps what it receives and what it sends: call by call, since C++ serves a step unseen (`test_step` records those)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.received: list[list[bytes]] = []
        self.sent: list[list[bytes]] = []
        super().__init__(*args, **options)
        self.enclave.begin = lambda *_: None  # type: ignore[method-assign]

    def answer(self, frames: list[Any], peer: str) -> list[Any]:
        """See `Server.answer`."""
        self.received.append([bytes(frame) for frame in frames])
        answer = super().answer(frames, peer)
        self.sent.append([bytes(frame) for frame in answer])
        return answer


@contextlib.contextmanager
def enclave_at(trusted: Path, address: str, kind: type[EnclaveServer] = EnclaveServer, **options: Any) -> Iterator[Any]:
    """An enclave in a thread of this process, which ends without delay."""
    server = kind(trusted, address, **options)
    thread = threading.Thread(target=server.serve, name="enclave")
    with patch.object(server_module, "_POLL_MILLISECONDS", 5):
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(10)
            assert not thread.is_alive()


@contextlib.contextmanager
def enclave(trusted: Path, kind: type[EnclaveServer] = EnclaveServer) -> Iterator[tuple[str, Any]]:
    """The same at an address of its own: (address, server)."""
    with tempfile.TemporaryDirectory(prefix="c-") as folder, enclave_at(trusted, f"ipc://{folder}/s", kind) as server:
        yield f"ipc://{folder}/s", server


def load(out: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model of OUT/exposed."""
    return AutoModelForCausalLM.from_pretrained(out / "exposed", dtype=dtype, **options)


@dataclass
class Attached:
    """A model, its session, its enclave's server, and the plain model."""

    family: str
    mode: str
    model: Any
    session: KvSession
    server: Any
    plain: PreTrainedModel

    @property
    def enclave(self) -> Enclave:
        """The enclave itself."""
        found: Enclave = self.server.enclave
        return found

    def keys(self, layer: int, session: int = -1) -> list[SessionKeys]:
        """The keys of the newest (or another) session in a layer, by sequence."""
        keys = list(self.enclave._sessions.values())[session].keys[layer]
        assert keys is not None
        return by_sequence(keys)


@contextlib.contextmanager
def attached(family: str, mode: str, kind: type[EnclaveServer] = EnclaveServer, timeout: float = 10) -> Iterator[Attached]:
    """A loaded model with an enclave in a thread."""
    with enclave(kv_bundle(family, mode) / "trusted", kind) as (address, server):
        model = load(kv_bundle(family, mode))
        session = cloven.attach(model, address, timeout=timeout)
        assert isinstance(session, KvSession)
        with session:
            yield Attached(family, mode, model, session, server, tiny(family))


def deviation(y: Tensor, expected: Tensor) -> float:
    """max |y − expected| / max |expected|."""
    return float((y.float() - expected.float()).abs().max() / expected.float().abs().max())


def ids_of(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without the pad, int64 [batch, length]."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, pads: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask [batch, length], with so many pads at the left."""
    ids, mask = ids_of(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    for row, count in enumerate(pads):
        ids[row, :count] = mask[row, :count] = 0
    return ids, mask


def random_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gaussians."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def half_split(d: int = 12, rotated: int | None = None) -> Rotary:
    """Llama's layout; the first `rotated` dimensions only (the rest passes)."""
    rotated = rotated or d
    half = rotated // 2
    frequencies = 1.0 / 100.0 ** (torch.arange(half).float() / half)
    j = torch.arange(d)
    partner = torch.where(j < half, j + half, torch.where(j < rotated, j - half, j))
    sign = torch.where(j < half, -1, torch.where(j < rotated, 1, 0))
    frequency = torch.where(j < rotated, j % half, half)
    return Rotary(frequencies, 1.0, frequency, partner, sign)


def positions_of(batch: int, rows: int, first: int = 0) -> Tensor:
    """int32 [batch, rows]: first, first + 1, …"""
    return (first + torch.arange(rows, dtype=torch.int32)).expand(batch, rows).contiguous()


def small_enclave(mode: str = "session", family: str = "llama") -> Enclave:
    """An enclave without a server."""
    return Enclave(kv_bundle(family, mode) / "trusted")
