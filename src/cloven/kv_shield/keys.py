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
    """The keys of sequences in one layer, k's and v's one after the other: float32, D = d + ρ.

    Args:
        kv: F and F_v [*batch, 2, G, D, D].
        inverse: F⁻ᵀ and F_v⁻¹, alike: what q and the attention output are multiplied with.
    """

    kv: Tensor
    inverse: Tensor

    def __repr__(self) -> str:
        return "SessionKeys(<secret>)"

    @property
    def k(self) -> Tensor:
        """F [*batch, G, D, D]."""
        return self.kv.select(-4, 0)

    @property
    def k_inverse(self) -> Tensor:
        """F⁻¹."""
        return self.inverse.select(-4, 0).mT

    @property
    def v(self) -> Tensor:
        """F_v."""
        return self.kv.select(-4, 1)

    @property
    def v_inverse(self) -> Tensor:
        """F_v⁻¹."""
        return self.inverse.select(-4, 1)


def session_keys(stream: SecretStream, kv_heads: int, size: int, *batch: int) -> SessionKeys:
    """Draw keys: one for k and one for v for every sequence of the batch and every kv head."""
    shape = (*batch, 2, kv_heads, size, size)
    kv, inverse = (part.view(shape) for part in _invertible(stream, math.prod(shape[:-2]), size))
    of_k = inverse.select(-4, 0)
    of_k.copy_(of_k.mT.clone())
    return SessionKeys(kv, inverse)


def _invertible(stream: SecretStream, count: int, size: int) -> tuple[Tensor, Tensor]:
    """`count` random matrices [D, D] of condition ≤ 10, and their inverses, float32."""
    half = 0.5 * math.log(CONDITION)
    u, v = _haar(stream, 2 * count, size).split(count)
    s = torch.exp((2 * torch.from_numpy(stream.uniform(count * size)).view(count, 1, size) - 1) * half).float()
    return (u * s) @ v.transpose(1, 2), (v / s) @ u.transpose(1, 2)


def _haar(stream: SecretStream, count: int, size: int) -> Tensor:
    """Orthogonal up to 10^-6, as float32 is."""
    q, r = torch.linalg.qr(stream.noise(count, size, size))
    haar: Tensor = q * torch.sign(torch.diagonal(r, dim1=1, dim2=2))[:, None, :]
    return haar
