"""`cloven bench kv-shield`: a model with a keyed cache against the stock model, in one interleaved run.

Five processes on the same cores: the stock model (bf16, transformers), and for each mode the model and its enclave, over ipc. Weights
are random. Rounds follow one another; in each, every model decodes and prefills. A slowdown is the median over rounds of a mode's median
time over the stock model's in the same round: a machine that is slower for a while is slower for all of them. Other figures are medians
over everything.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloven.bench.runner import random_model
from cloven.bench.runner_process import RunnerProcess
from cloven.cluster.enclave_process import EnclaveProcess
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.messages import MAX_BLOCK_BYTES, Label
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.kv_shield.vault import Vault
from cloven.zoo.shapes import shape_config

MODES = ("permute", "session")
ROUNDS = 9
PREFILL, PREFILLS = 512, 3  # tokens, and times per round
_SEALED_BLOCKS = 16
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class KvBench:
    """Medians of one interleaved run; slowdowns are protected / stock time, round by round; the model is bf16."""

    shape: str
    layers: int
    layers_of_shape: int
    rounds: int
    tokens_per_round: int
    decode_slowdown_permute: float
    decode_slowdown_session: float
    prefill_slowdown_permute: float
    prefill_slowdown_session: float
    call_us: dict[str, float]
    calls_per_token: float
    bytes_per_token: dict[str, float]
    tokens_per_s_stock: float
    tokens_per_s: dict[str, float]
    prefill_512_s_stock: float
    prefill_512_s: dict[str, float]
    seal_gb_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def bench_kv_shield(
    shape: str, progress: Progress, *, tokens: int = 8, layers: int | None = None, noise_dims: int = 16, rounds: int = ROUNDS
) -> KvBench:
    """Measure a shape.

    Args:
        tokens: decoded tokens per round.
        layers: decoder layers; None: all.

    Raises:
        BadInput: unknown shape.
    """
    whole = int(shape_config(shape).num_hidden_layers)
    layers = layers or whole
    with tempfile.TemporaryDirectory(prefix="cloven-bench-") as folder:
        for mode in MODES:
            progress(f"preparing, {mode}", 0, 1)
            prepare_kv_shield(random_model(shape, str(layers)), Path(folder) / mode, KvShieldConfig(mode, noise_dims))
        progress("loading", 0, 1)
        decodes: dict[str, list[dict[str, Any]]] = {name: [] for name in ("stock", *MODES)}
        prefills: dict[str, list[dict[str, Any]]] = {name: [] for name in ("stock", *MODES)}
        half = {mode: Path(folder) / mode for mode in MODES}
        with (
            EnclaveProcess(half["permute"] / "trusted") as first,
            EnclaveProcess(half["session"] / "trusted") as second,
            RunnerProcess("plain", shape, str(layers)) as stock,
            RunnerProcess("keyed", str(half["permute"] / "exposed"), first.address) as permute,
            RunnerProcess("keyed", str(half["session"] / "exposed"), second.address) as session,
        ):
            runners = {"stock": stock, "permute": permute, "session": session}
            for done in range(rounds + 1):  # the first round warms up
                progress("rounds", done, rounds + 1)
                for name, runner in runners.items():
                    decode = runner.ask("decode", tokens=tokens)
                    prefill = [s for _ in range(PREFILLS) for s in runner.ask("prefill", tokens=PREFILL)["seconds"]]
                    if done:
                        decodes[name].append(decode)
                        prefills[name].append({"seconds": prefill})
    one = {name: statistics.median(s for result in results for s in result["seconds"]) for name, results in decodes.items()}
    all_512 = {name: statistics.median(s for result in results for s in result["seconds"]) for name, results in prefills.items()}

    def slowdown(results: dict[str, list[dict[str, Any]]], mode: str) -> float:
        pairs = zip(results[mode], results["stock"], strict=True)
        ratios: list[float] = [statistics.median(ours["seconds"]) / statistics.median(stock["seconds"]) for ours, stock in pairs]
        return statistics.median(ratios)

    def middle(mode: str, key: str) -> float:
        return statistics.median(float(result[key]) for result in decodes[mode])

    return KvBench(
        shape=shape,
        layers=layers,
        layers_of_shape=whole,
        rounds=rounds,
        tokens_per_round=tokens,
        decode_slowdown_permute=slowdown(decodes, "permute"),
        decode_slowdown_session=slowdown(decodes, "session"),
        prefill_slowdown_permute=slowdown(prefills, "permute"),
        prefill_slowdown_session=slowdown(prefills, "session"),
        call_us={mode: 1e6 * middle(mode, "seconds_waiting") / middle(mode, "exchanges") for mode in MODES},
        calls_per_token=middle("permute", "exchanges"),
        bytes_per_token={mode: middle(mode, "bytes_up") + middle(mode, "bytes_down") for mode in MODES},
        tokens_per_s_stock=1 / one["stock"],
        tokens_per_s={mode: 1 / one[mode] for mode in MODES},
        prefill_512_s_stock=all_512["stock"],
        prefill_512_s={mode: all_512[mode] for mode in MODES},
        seal_gb_per_s=_sealing_speed(),
    )


def _sealing_speed() -> float:
    """GB/s of one core that encrypts blocks, without the link."""
    vault, data = Vault(bytes(16), secrets.token_bytes(16)), memoryview(bytes(MAX_BLOCK_BYTES))
    vault.seal(Label(0, "keys", 0, (1,), "uint8"), data)
    started = time.perf_counter()
    for block in range(1, _SEALED_BLOCKS):
        vault.seal(Label(0, "keys", block, (1,), "uint8"), data)
    return (_SEALED_BLOCKS - 1) * MAX_BLOCK_BYTES / 1e9 / (time.perf_counter() - started)
