"""From the exposed parts of a group's matrices to the int8 matrix that a worker holds, and back.

    E = [E_1; E_2; …]                       stacked [N, K]
    Ê = E diag(c)^-1                        columns equalised: c_j = ‖E_·j‖ / mean; the trusted process multiplies x by c
    Ê_i ≈ r_i (q1_i + q2_i / 254)           rows quantised, |q| ≤ 127; the second term only with int8x2
    Q = [q1; q2]                            [T·N, K], T terms
    X[a, b] = s_a t_b Q[ρ(a), κ(b)]         scrambled with secret permutations ρ, κ and signs s, t: this is exposed

With x'_b = t_b c_κ(b) x_κ(b) the worker's X x' holds (Q diag(c) x)_ρ(a) up to signs, so that

    (E x)_i = Σ_terms  row_scale[term, i] · (X x')[row_gather[term, i]]

where signs, r and 1/254 are folded in `row_scale`. Scales, permutations and signs stay trusted. The scramble is a heuristic of ours,
attacked by the audit; column norms are equalised because an attacker would align by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.field.prg import SecretStream

_SECOND_TERM = 254  # |remainder| ≤ ½, times 254 ≤ 127


@dataclass(frozen=True)
class ExposedMatrix:
    """A group's exposed matrix and what the trusted process needs to use it.

    codes int8 [T·N, K] (exposed); column_gather int32 [K], column_scale float32 [K], row_gather int32 [T, N],
    row_scale float32 [T, N] (secret).
    """

    codes: Tensor
    column_gather: Tensor
    column_scale: Tensor
    row_gather: Tensor
    row_scale: Tensor

    def __repr__(self) -> str:
        return f"ExposedMatrix({tuple(self.codes.shape)}, <secret>)"

    def dequantised(self, rows: slice = slice(None)) -> Tensor:
        """E [N, K] (or some of its rows) as the trusted process reads it, float64: undoes the scramble and the quantisation."""
        scrambled = sum(
            self.codes[gather.long()].to(torch.float64) * scale.to(torch.float64)[:, None]
            for gather, scale in zip(self.row_gather[:, rows], self.row_scale[:, rows], strict=True)
        )
        assert isinstance(scrambled, Tensor)
        unscrambled = torch.empty_like(scrambled)
        unscrambled[:, self.column_gather.long()] = scrambled * self.column_scale.to(torch.float64)
        return unscrambled


def _quantise(matrix: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Ê [N, K] -> codes int8 [T·N, K], scales float64 [T, N]."""
    scale = matrix.abs().amax(1) / 127
    scale = torch.where(scale == 0, 1.0, scale).to(torch.float32).to(matrix.dtype)  # as it will be stored
    exact = matrix / scale[:, None]
    first = exact.round().clamp_(-127, 127)
    codes, scales = [first.to(torch.int8)], [scale.to(torch.float64)]
    if terms == 2:
        codes.append(exact.sub_(first).mul_(_SECOND_TERM).round_().clamp_(-127, 127).to(torch.int8))
        scales.append(scale.to(torch.float64) / _SECOND_TERM)
    return torch.cat(codes), torch.stack(scales)


def expose(matrix: Tensor, terms: int, stream: SecretStream | None) -> ExposedMatrix:
    """Equalise, quantise and scramble a stacked matrix.

    Args:
        matrix: E, float64 or float32 [N, K].
        terms: number of int8 terms, 1 or 2.
        stream: secret randomness for the scramble; None leaves rows and columns in place.
    """
    n, k = matrix.shape
    column = torch.linalg.vector_norm(matrix, dim=0)
    column = torch.where(column == 0, 1.0, column / column.mean().clamp_min(1e-30)).to(torch.float32).to(matrix.dtype)
    codes, scales = _quantise(matrix / column, terms)  # [T·N, K], [T, N]
    if stream is None:
        gather, rows = torch.arange(k), torch.arange(terms * n).view(terms, n)
    else:
        rho, row_sign = stream.permutation(terms * n), stream.signs(terms * n)
        gather, column_sign = stream.permutation(k), stream.signs(k)
        codes = codes[rho][:, gather] * row_sign.to(torch.int8)[:, None] * column_sign.to(torch.int8)
        rows = torch.argsort(rho).view(terms, n)  # ρ^-1
        scales = scales * row_sign[rows]
        column = column[gather].to(torch.float64) * column_sign
    return ExposedMatrix(
        codes.contiguous(),
        gather.to(torch.int32),
        column.to(torch.float32),
        rows.to(torch.int32).contiguous(),
        scales.to(torch.float32).contiguous(),
    )
