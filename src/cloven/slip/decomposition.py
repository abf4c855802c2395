"""The SVD split of one matrix, with the decoy.

    W = U Σ Vᵀ                      W [N, K], U [N, r], V [K, r], r = min(N, K)
    R = W − U_k Σ_k V_kᵀ            removing the top singular part leaves U_k and V_k as null spaces of R: it would mark them
    exposed  E = R + (U_k D O + Y) V_kᵀ
             O Haar-random [k, k], D drawn from the density of the kept spectrum σ_{k+1..r}: the hole is filled
             Y = R G / ‖·‖, columns a third as long as D's rms, G Gaussian: couples the filling with the rest
    secret   B A = W − E,  A = V_kᵀ [k, K],  B = U_k (Σ_k − D O) − Y [N, k]

D must not be copied from the spectrum: a copied value stands in E's spectrum twice, and the pairs point at the secret (measured: overlap
0.999 with int8x2). And without Y the filling consists of singular vectors of E of its own, whose values lie independently among the
others; with Y every singular vector of E is a mixture.

Guarantee: E's spectrum and singular vectors do not single out the secret's subspaces (tested: overlap at chance level). What E itself
gives away of W is measured by the audit, not proved. Source: SLIP, arXiv 2407.10886; the decoy is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.field.prg import SecretStream

_EXACT_SVD = 768  # smaller side up to which the SVD is exact; above, randomised subspace iteration
_EXACT_ENTRIES = 2**24  # and entries: the exact one takes six times the matrix in float32
_FLOAT64_SPECTRUM = 1024
_FLOAT64_SPLIT = 2**22  # entries up to which E is computed in float64; float32 above, to spare memory: its rounding is far below int8x2's
_GRAM_BLOCKS = 8
_OVERSAMPLING = 16
_ITERATIONS = 6
_COUPLING = 1 / 3


@dataclass(frozen=True)
class Split:
    """W = exposed + secret_b @ secret_a: exposed [N, K] (float64, or float32 if large), secret_b [N, k], secret_a [k, K] float64."""

    exposed: Tensor
    secret_a: Tensor
    secret_b: Tensor

    def __repr__(self) -> str:
        return f"Split(rank={self.secret_a.shape[0]}, <secret>)"


def spectrum(w: Tensor) -> Tensor:
    """All singular values of W, descending, float64 [min(N, K)]: the square roots of the smaller Gram matrix's eigenvalues."""
    w = w.to(torch.float64 if min(w.shape) <= _FLOAT64_SPECTRUM else torch.float32)
    squares: Tensor = torch.linalg.eigvalsh(_lower_gram(w if w.shape[0] <= w.shape[1] else w.t()), UPLO="L")
    return squares.flip(0).clamp_min(0).sqrt().to("cpu", torch.float64)


def _lower_gram(w: Tensor) -> Tensor:
    """The lower triangle of W Wᵀ (and some blocks' upper ones): little more than half of the multiplications."""
    n = w.shape[0]
    gram = w.new_zeros(n, n)
    step = -(-n // _GRAM_BLOCKS)
    for start in range(0, n, step):
        end = min(start + step, n)
        gram[start:end, :end] = w[start:end] @ w[:end].t()
    return gram


def allocate_ranks(spectra: list[Tensor], shapes: list[tuple[int, int]], fraction: float) -> list[int]:
    """Spend a global budget greedily: the next singular value is the one with most energy per parameter, σ² / (N + K).

    Args:
        spectra: singular values of each matrix, descending.
        shapes: (N, K) of each matrix.
        fraction: budget as a share of Σ N·K.

    Returns:
        Ranks, at most half of min(N, K) each (something must be left to fill the hole with), whose parameters stay in the budget.
    """
    budget = fraction * sum(n * k for n, k in shapes)
    values = torch.cat([s[: min(n, k) // 2] ** 2 / (n + k) for s, (n, k) in zip(spectra, shapes, strict=True)])
    costs = torch.cat([torch.full((min(n, k) // 2,), float(n + k)) for n, k in shapes])
    owners = torch.cat([torch.full((min(n, k) // 2,), i) for i, (n, k) in enumerate(shapes)])
    order = torch.argsort(values, descending=True, stable=True)
    affordable = torch.cumsum(costs[order].to(torch.float64), 0) <= budget
    return torch.bincount(owners[order][affordable], minlength=len(shapes)).tolist()


def truncated_svd(w: Tensor, k: int, stream: SecretStream, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """The top k singular triples of W: U_k [N, k], σ [k], V_kᵀ [k, K], float64.

    Exact for small matrices; else a randomised range finder with subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4),
    in float32 with a float64 finish. Computed on `device`; the bits depend on it.
    """
    if min(w.shape) <= _EXACT_SVD and w.numel() <= _EXACT_ENTRIES:
        u, s, vt = torch.linalg.svd(w.to(device, torch.float64), full_matrices=False)
        return u[:, :k].cpu(), s[:k].cpu(), vt[:k].cpu()
    narrow = w.to(device, torch.float32)
    q = narrow @ stream.normal(w.shape[1], min(k + k // 2 + _OVERSAMPLING, *w.shape)).to(device, torch.float32)
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(q).Q
        q = narrow @ torch.linalg.qr(narrow.t() @ q).Q
    basis = torch.linalg.qr(q.to(torch.float64)).Q  # [N, k + oversampling]
    u, s, vt = torch.linalg.svd((basis.to(torch.float32).t() @ narrow).to(torch.float64), full_matrices=False)
    return (basis @ u)[:, :k].cpu(), s[:k].cpu(), vt[:k].cpu()


def _draw_between(values: Tensor, n: int, stream: SecretStream) -> Tensor:
    """n values with the density of a descending spectrum, none of them in it: uniform positions, linear interpolation."""
    position = torch.from_numpy(stream.uniform(n)) * (len(values) - 1)
    below = position.long().clamp_max(max(len(values) - 2, 0))
    above = (below + 1).clamp_max(len(values) - 1)
    return torch.lerp(values[below], values[above], position - below)


def precise(entries: int) -> torch.dtype:
    """In which dtype a matrix is split: float64, or float32 if it is large."""
    return torch.float64 if entries <= _FLOAT64_SPLIT else torch.float32


def split(w: Tensor, rank: int, values: Tensor, stream: SecretStream, out: Tensor | None = None, device: str = "cpu") -> Split:
    """Split W [N, K] at a rank, with the decoy.

    Args:
        values: all singular values of W, descending; what lies beyond the rank fills the hole.
        stream: secret randomness for O, D and the sketch.
        out: where to put E, in the dtype of `precise`; may be W itself, to spare memory.
        device: where the factorisation is computed.
    """
    w = w.to(precise(w.numel()) if out is None else out.dtype)
    if rank == 0:
        return _without(w, w.new_zeros(w.shape[0], 0), w.new_zeros(0, w.shape[1]), out)
    u, s, vt = truncated_svd(w, rank, stream, device)
    sizes = _draw_between(values[rank:], rank, stream)  # D
    probe = stream.normal(w.shape[1], rank).to(w.dtype)  # G
    # R G, without a copy of R = W − U_k Σ_k V_kᵀ
    coupling = (w @ probe - (u * s).to(w.dtype) @ (vt.to(w.dtype) @ probe)).to(torch.float64)
    lengths = torch.linalg.vector_norm(coupling, dim=0).clamp_min(1e-300)
    coupling *= _COUPLING * sizes.square().mean().sqrt() / lengths  # Y
    secret_b = u @ (torch.diag(s) - sizes[:, None] * stream.orthogonal(rank)) - coupling
    return _without(w, secret_b, vt, out)


def truncate(w: Tensor, difference: Tensor, rank: int, stream: SecretStream, out: Tensor | None = None, device: str = "cpu") -> Split:
    """W without the top singular part of its difference from a public base, W − W_base [N, K]; no decoy. Arguments as of `split`."""
    w = w.to(precise(w.numel()) if out is None else out.dtype)
    u, s, vt = truncated_svd(difference, rank, stream, device)
    return _without(w, u * s, vt, out)


def _without(w: Tensor, secret_b: Tensor, secret_a: Tensor, out: Tensor | None) -> Split:
    exposed = torch.empty_like(w) if out is None else out
    torch.addmm(w, secret_b.to(w.dtype), secret_a.to(w.dtype), alpha=-1, out=exposed)
    return Split(exposed, secret_a, secret_b)
