"""`cloven bench private-lora`: the protocol alone, client and server in two processes over ipc, without the base model.

    online    per token and group: encode, mask, exchange, unmask, decode, V v, with masks ready
    offline   making the masks, in batches
    server    the product and the rounding alone
    prefill   512 rows in every group, with masks ready

Weights are random. Every round runs all backends; figures are medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloven.bench.ledgers import ledgers_in
from cloven.bench.references import Reference, references
from cloven.cluster.adapter_process import AdapterServerProcess
from cloven.field.products import multiply
from cloven.field.selection import select_backend
from cloven.masks.lwe import LweMasks
from cloven.private_lora.layer import deltas
from cloven.private_lora.messages import ADAPTER, rounded
from cloven.private_lora.session import SPIN_SECONDS, remote_matrix
from cloven.telemetry import Telemetry
from cloven.wire.channel import Channel
from cloven.zoo.random_adapter import RandomAdapter, write_random_adapter

ROUNDS = 5
PREFILL = 512
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BackendFigures:
    """One backend: milliseconds per generated token over all layers, and per (layer, token); message bytes per (layer, token).

    `protocol_ms_per_token` is what a token waits for: client and server together; `mask_ms_per_token` what is made in the background.
    """

    protocol_ms_per_token: float
    mask_ms_per_token: float
    server_ms_per_token: float
    protocol_ms_per_layer: float
    mask_ms_per_layer: float
    server_ms_per_layer: float
    bytes_up_per_layer: float
    bytes_down_per_layer: float
    prefill_512_s: float | None


@dataclass(frozen=True)
class LoraBench:
    """Medians of one interleaved run."""

    shape: str
    layers: int
    rank: int
    columns: int
    rounds: int
    lwe: BackendFigures
    prefill_512_masks_s: float
    backends: dict[str, BackendFigures]
    not_installed: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the figures of `lwe` stand at the top as well."""
        return asdict(self) | asdict(self.lwe)


class _Client:
    """The client's side of all groups, with the channel to a real server."""

    def __init__(self, adapter: RandomAdapter, address: str) -> None:
        self.telemetry = Telemetry()
        options: dict[str, Any] = {"schema": ADAPTER, "peer": "adapter-server", "spin": SPIN_SECONDS, "timeout": 120.0}
        self.channel = Channel(address, adapter.bundle, telemetry=self.telemetry, **options)
        self.channel.hello()
        parameters, backend = adapter.config.parameters, select_backend("cpu")
        self.masks, self.remote, self.adapter = [], [], adapter
        for index, (group, hint) in enumerate(zip(adapter.groups, adapter.hints, strict=True)):
            masks = LweMasks(hint, parameters.pad_columns + group.columns, parameters, backend)
            self.masks.append(masks)
            self.remote.append(remote_matrix(index, group, adapter.config.bits, parameters, masks, self.channel))

    def make_masks(self, rows: int) -> float:
        """Seconds to make masks for `rows` rows in every group."""
        started = time.perf_counter()
        for masks in self.masks:
            masks.fill(rows)
        return time.perf_counter() - started

    def run(self, x: Tensor) -> float:
        """Seconds for rows x float64 [M, K] through every group."""
        started = time.perf_counter()
        for index, remote in enumerate(self.remote):
            deltas(remote.product(x, lambda: None), self.adapter.scales[index], self.adapter.bases[index])
        return time.perf_counter() - started


@torch.no_grad()
def bench_private_lora(
    shape: str, progress: Progress, *, tokens: int = 16, rounds: int = ROUNDS, layers: int | None = None, prefill: int = PREFILL
) -> LoraBench:
    """Measure a shape.

    Args:
        tokens: generated tokens per round.
        layers: fewer layers than the shape has.
        prefill: rows of the prefill.

    Raises:
        BadInput: unknown shape.
    """
    with tempfile.TemporaryDirectory(prefix="cloven-bench-") as name, ledgers_in(Path(name)):
        progress("preparing", 0, 1)
        adapter = write_random_adapter(Path(name), shape, 2 * (rounds + 1) * (tokens + prefill) + 1024, layers)
        columns = adapter.groups[0].columns
        x = torch.randn(max(tokens, prefill), columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        one: dict[str, list[float]] = {"online": [], "offline": [], "server": [], "prefill": [], "prefill masks": []}
        others, missing = references(adapter)
        with AdapterServerProcess(Path(name) / "server") as server:
            client = _Client(adapter, server.address)
            for done in range(rounds + 1):  # the first round warms up
                progress("rounds", done, rounds + 1)
                offline = client.make_masks(tokens) / tokens
                client.telemetry.reset()
                online = [client.run(x[row : row + 1]) for row in range(tokens)]
                traffic = client.telemetry.total()
                prefill_masks = client.make_masks(prefill)
                times = {"prefill": [client.run(x[:prefill])], "online": online, "offline": [offline], "prefill masks": [prefill_masks]}
                times["server"] = [_server_seconds(adapter) for _ in range(tokens)]
                for reference in others.values():
                    reference.measure(x[0])
                if done:
                    for key, seconds in times.items():
                        one[key] += seconds
            client.channel.close()
    count = len(adapter.groups)
    middle = {key: 1000 * statistics.median(values) for key, values in one.items()}
    lwe = BackendFigures(
        protocol_ms_per_token=middle["online"],
        mask_ms_per_token=middle["offline"],
        server_ms_per_token=middle["server"],
        protocol_ms_per_layer=middle["online"] / count,
        mask_ms_per_layer=middle["offline"] / count,
        server_ms_per_layer=middle["server"] / count,
        bytes_up_per_layer=traffic.bytes_up / traffic.exchanges,
        bytes_down_per_layer=traffic.bytes_down / traffic.exchanges,
        prefill_512_s=middle["prefill"] / 1000,
    )
    return LoraBench(
        shape=shape,
        layers=count,
        rank=adapter.groups[0].modules[0].rank,
        columns=columns,
        rounds=rounds,
        lwe=lwe,
        prefill_512_masks_s=middle["prefill masks"] / 1000,
        backends={"lwe": lwe} | {name: _figures(reference, count) for name, reference in others.items()},
        not_installed=missing,
    )


def _server_seconds(adapter: RandomAdapter) -> float:
    """Seconds of the server's own work for one row in every group."""
    backend = select_backend("cpu")
    rows = [torch.ones(1, matrix.shape[1], dtype=torch.int32) for matrix in adapter.matrices]
    placed = [backend.place(matrix) for matrix in adapter.matrices]
    started = time.perf_counter()
    for c, w in zip(rows, placed, strict=True):
        rounded(multiply(backend, c, w), adapter.config.bits)
    return time.perf_counter() - started


def _figures(reference: Reference, layers: int) -> BackendFigures:
    """A reference is measured on one layer in one process, and multiplied by the number of layers."""
    client, server = (1000 * statistics.median(values[1:] or values) for values in (reference.client_seconds, reference.server_seconds))
    return BackendFigures(
        protocol_ms_per_token=(client + server) * layers,
        mask_ms_per_token=0.0,
        server_ms_per_token=server * layers,
        protocol_ms_per_layer=client + server,
        mask_ms_per_layer=0.0,
        server_ms_per_layer=server,
        bytes_up_per_layer=reference.bytes_up,
        bytes_down_per_layer=reference.bytes_down,
        prefill_512_s=None,
    )
