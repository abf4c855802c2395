"""An adapter server's half with random weights of a known shape, and what its client needs, without a model: for benchmarks."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cloven.errors import BadInput
from cloven.field.prg import KEY_BYTES
from cloven.model.adapter import LoraModule
from cloven.private_lora.config import PrivateLoraConfig
from cloven.private_lora.ledger import create_ledger
from cloven.private_lora.manifest import ClientGroup, ClientManifest
from cloven.private_lora.names import basis_name, hint_name, scales_name
from cloven.private_lora.prepare import LEDGER_FILE, split_groups, write_server

RANK = 8
# Layers, inputs, and outputs of the adapted linears of a layer that share an input.
ADAPTER_SHAPES: dict[str, tuple[int, int, dict[str, int]]] = {
    "chatglm2-6b": (28, 4096, {"query_key_value": 4608}),
    "llama-2-7b": (32, 4096, {"q_proj": 4096, "v_proj": 4096}),
    "demo": (5, 256, {"q_proj": 256, "v_proj": 128}),
}


@dataclass(frozen=True)
class RandomAdapter:
    """The client's side of a random adapter: as `ClientManifest` and tensors would give it."""

    bundle: bytes
    config: PrivateLoraConfig
    groups: tuple[ClientGroup, ...]
    hints: list[Tensor]
    scales: list[Tensor]
    bases: list[list[Tensor]]
    matrices: list[Tensor]


def write_random_adapter(folder: Path, shape: str, budget: int, layers: int | None = None) -> RandomAdapter:
    """Write FOLDER/server for `AdapterServer`; the weights are random, and no secret.

    Raises:
        BadInput: unknown shape, or layers that it does not have.
    """
    if shape not in ADAPTER_SHAPES:
        raise BadInput(f"shape {shape!r}: choose one of {', '.join(ADAPTER_SHAPES)}")
    whole, inputs, outputs = ADAPTER_SHAPES[shape]
    if layers is not None and not 1 <= layers <= whole:
        raise BadInput(f"{layers} layers: {shape} has {whole}")
    generator = torch.Generator().manual_seed(0)

    def module(layer: int, name: str, width: int) -> LoraModule:
        a, b = torch.randn(RANK, inputs, generator=generator), torch.randn(width, RANK, generator=generator)
        return LoraModule(f"layers.{layer}.{name}", a, b, 0.01)

    groups = [[module(layer, name, width) for name, width in outputs.items()] for layer in range(layers or whole)]
    config = PrivateLoraConfig(budget)
    rotation = secrets.token_bytes(KEY_BYTES)
    described, matrices, public, quantised = split_groups(groups, config.parameters, rotation, lambda stage, done, total: None)
    bundle, adapter = secrets.token_hex(16), secrets.token_hex(32)
    manifest = ClientManifest(bundle, secrets.token_hex(16), config.bits, config.hint, "0" * 64, "", described, "0" * 64, {})
    (folder / "server").mkdir(parents=True)
    write_server(folder / "server", manifest, matrices, quantised, adapter, LEDGER_FILE)
    create_ledger(folder / "server" / LEDGER_FILE, adapter, budget, budget, rotation)
    count = range(len(groups))
    return RandomAdapter(
        bytes.fromhex(bundle),
        config,
        described,
        [public[hint_name(index)] for index in count],
        [public[scales_name(index)] for index in count],
        [[public[basis_name(index, position)] for position in range(len(outputs))] for index in count],
        matrices,
    )
