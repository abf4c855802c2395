"""Parameters of KV-Shield."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cloven.errors import BadInput

MODES = ("permute", "session")


@dataclass(frozen=True)
class KvShieldConfig:
    """What `prepare_kv_shield` does.

    Args:
        mode: "permute": a secret permutation per kv head, folded into the weights, as published (with the corrections that multi-head
            attention and RoPE need); "session": fresh invertible keys for every sequence and prefill, drawn in the enclave.
        noise_dims: ρ, random dimensions added to k and v in session mode.
        seal_idle: let idle caches be encrypted.
    """

    mode: str = "permute"
    noise_dims: int = 16
    seal_idle: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BadInput(f"mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if not 2 <= self.noise_dims <= 256 or self.noise_dims % 2:
            raise BadInput(f"noise dimensions {self.noise_dims}: give an even number from 2 to 256")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
