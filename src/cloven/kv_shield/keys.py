"""Keys of KV-Shield, all from the operating system's randomness.

permute   Π per layer and kv head, one for q and k, one for v:     x'_j = x_π(j)
session   F per sequence, layer and kv head, one for k, one for v: k' = [k, ν] F,  q' = [q, 0] F⁻ᵀ,  v' = [v, ν] F_v

    q'·k' = [q, 0] F⁻ᵀ Fᵀ [k, ν]ᵀ = q·k        a' = Σ_t p_t v'_t = [a, Σ p_t ν_t] F_v,  so  a = (a' F_v⁻¹)[: d]

F = U diag(s) Vᵀ with U, V Haar-random and s log-uniform in [10^-½, 10^½]: condition number at most 10, which costs less than one digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.field.prg import SecretStream

CONDITION = 10.0


def permutations(stream: SecretStream, kv_heads: int, head_dim: int) -> Tensor:
    """One secret permutation per kv head: int64 [G, d]."""
    return torch.stack([stream.permutation(head_dim) for _ in range(kv_heads)])


@dataclass(frozen=True)
class SessionKeys:
    """One sequence's keys in one layer: float32 [G, D, D] each, D = d + ρ."""

    k: Tensor
    k_inverse: Tensor
    v: Tensor
    v_inverse: Tensor

    def __repr__(self) -> str:
        return "SessionKeys(<secret>)"


def session_keys(stream: SecretStream, kv_heads: int, size: int) -> SessionKeys:
    """Draw the keys of one sequence in one layer."""
    pairs = [_invertible(stream, kv_heads, size) for _ in range(2)]
    return SessionKeys(*pairs[0], *pairs[1])


def _invertible(stream: SecretStream, count: int, size: int) -> tuple[Tensor, Tensor]:
    """`count` random matrices [D, D] of condition ≤ 10, and their inverses, float32."""
    half = 0.5 * math.log(CONDITION)
    u, v = (_haar(stream, count, size) for _ in range(2))
    s = torch.exp((2 * torch.from_numpy(stream.uniform(count * size)).view(count, 1, size) - 1) * half)
    return ((u * s) @ v.transpose(1, 2)).float(), ((v / s) @ u.transpose(1, 2)).float()


def _haar(stream: SecretStream, count: int, size: int) -> Tensor:
    q, r = torch.linalg.qr(stream.normal(count * size, size).view(count, size, size))
    haar: Tensor = q * torch.sign(torch.diagonal(r, dim1=1, dim2=2))[:, None, :]
    return haar
