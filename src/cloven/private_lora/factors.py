"""An adapter's factors as they are split between client and server.

    s·B A = V C          V = Q Oᵀ [N, r] orthonormal, at the client;  C = s·O T A [r, K], at the server      (B = Q T,  O Haar-random)

O hides T: with V = Q alone the client would see the basis that Gram–Schmidt makes of B, and with the singular vectors of B A the rows of C
would be ordered by strength. The client gets the column space of B, and the norms of the rows of C, in any case. O is the same for every
bundle of an adapter: the norms under about r/2 different rotations, whose V₁ᵀ V₂ = O₁ O₂ᵀ everybody knows, would give all of C Cᵀ.

    C_j ≈ σ_j (Ŵ_j + Ŵ'_j / g)         Ŵ, Ŵ' int8: all rows of Ŵ have nearly the same L2 norm; Ŵ' is the remainder, g ≈ 110: about 15 bits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.field.prg import SecretStream
from cloven.model.adapter import LoraModule
from cloven.private_lora.config import TERMS

_LARGEST = 127.0


@dataclass(frozen=True)
class Core:
    """What the server computes with, for one module, before quantisation: C float64 [r, K]; and the client's V float32 [N, r]."""

    name: str
    basis: Tensor
    rows: Tensor

    def __repr__(self) -> str:
        return f"Core({self.name}, r={self.rows.shape[0]})"


def factor(module: LoraModule, key: bytes) -> Core:
    """V and C of one module.

    Args:
        key: the adapter's rotation key: 32 secret bytes, the same for every bundle of the adapter.
    """
    q, t = torch.linalg.qr(module.b.double())  # [N, r], [r, r]
    rotation = SecretStream(key, f"rotation/{module.name}").orthogonal(t.shape[0])  # O
    rows = module.scale * (rotation @ t @ module.a.double())
    return Core(module.name, (q @ rotation.t()).float(), rows)


@dataclass(frozen=True)
class Quantised:
    """int8 codes [2R, K] of the stacked rows of a group (first terms, then remainders), scales float64 [2R], and a bound on ‖codes_j‖₂.

    `error`: ‖C − scales·codes‖ / ‖C‖. `entropy`: bits per weight of the row that has fewest, by the frequencies of its codes.
    """

    codes: Tensor
    scales: Tensor
    l2: int
    error: float
    entropy: float

    def __repr__(self) -> str:
        return f"Quantised({tuple(self.codes.shape)})"


def quantise(rows: Tensor) -> Quantised:
    """Quantise rows C float64 [R, K], none of them zero, with first terms of equal norm, and remainders on a common gain."""
    norms = rows.norm(dim=1, keepdim=True)
    unit = rows / norms
    length = _LARGEST / float(unit.abs().max())  # the norm that all first terms get
    first = (unit * length).round()
    rest = unit * length - first
    top = float(rest.abs().max())
    gain = min(length / float(rest.norm(dim=1).max()), _LARGEST / top) if top > 0 else 1.0
    codes = torch.cat([first, (rest * gain).round()])
    scale = (norms / length).flatten()
    l2 = int(codes.norm(dim=1).max()) + 1
    scales = torch.cat([scale, scale / gain])
    error = float(((codes * scales[:, None]).view(TERMS, *rows.shape).sum(0) - rows).norm() / rows.norm())
    entropy = min(_entropy(row) for row in codes if row.any())
    return Quantised(codes.to(torch.int8), scales, l2, error, entropy)


def _entropy(row: Tensor) -> float:
    _, counts = row.unique(return_counts=True)
    share = counts.double() / len(row)
    return float(-(share * share.log2()).sum())
