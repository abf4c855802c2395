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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.field.prg import SecretStream

_SECOND_TERM = 254  # |remainder| ≤ ½, times 254 ≤ 127
_ENTRIES_AT_A_TIME = 2**21
_SAMPLED_ROWS = 256
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


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


def expose(
    matrix: Tensor, terms: int, stream: SecretStream | None, reference: Tensor | None = None, activations: Tensor | None = None
) -> ExposedMatrix:
    """Equalise, quantise and scramble a stacked matrix, some rows at a time: memory is that of the codes.

    Args:
        matrix: E, float64 or float32 [N, K].
        terms: number of int8 terms, 1 or 2.
        stream: secret randomness for the scramble; None leaves rows and columns in place.
        reference: take the scales from this matrix instead; what of E exceeds them is clipped. For a public base: the scales then say
            nothing of the secret.
        activations: root mean squares of x, float64 [K], > 0 somewhere: columns that meet large activations are then quantised finer.
    """
    n, k = matrix.shape
    column, scale = _scales(matrix if reference is None else reference, activations, terms)
    if stream is None:
        rho, row_sign = torch.arange(terms * n), torch.ones(terms * n, dtype=torch.float64)
        gather, column_sign = torch.arange(k), torch.ones(k, dtype=torch.float64)
    else:
        rho, row_sign = stream.permutation(terms * n), stream.signs(terms * n)
        gather, column_sign = stream.permutation(k), stream.signs(k)
    rows = torch.argsort(rho).view(terms, n)  # ρ^-1
    codes = torch.empty(terms * n, k, dtype=torch.int8)
    flips = column_sign.to(torch.int8)
    step = rows_at_a_time(k)
    for first in range(0, n, step):
        part = slice(first, first + step)
        for places, term in zip(rows[:, part], _quantised(matrix[part], column, scale[part], terms), strict=True):
            codes[places] = term[:, gather].mul_(row_sign[places].to(torch.int8)[:, None]).mul_(flips)
    units = torch.tensor([1.0, 1 / _SECOND_TERM], dtype=torch.float64)[:terms, None]
    return ExposedMatrix(
        codes,
        gather.to(torch.int32),
        (column[gather] * column_sign).to(torch.float32),
        rows.to(torch.int32).contiguous(),
        (scale * units * row_sign[rows]).to(torch.float32).contiguous(),
    )


def rows_at_a_time(columns: int) -> int:
    """Rows whose float64 intermediates stay small, whatever the matrix's size."""
    return max(1, _ENTRIES_AT_A_TIME // columns)


def _scales(matrix: Tensor, activations: Tensor | None, terms: int) -> tuple[Tensor, Tensor]:
    """c [K] and r [N], float64 with values that float32 holds: what is stored is what the codes were made with."""
    parts = matrix.split(rows_at_a_time(matrix.shape[1]))
    largest = torch.stack([part.abs().max() for part in parts]).max().to(torch.float64).clamp_min(1e-300)  # its square may overflow
    squares = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for part in parts:
        squares += (part.to(torch.float64) / largest).square_().sum(0)
    column = squares.sqrt_()
    column = _stored(torch.where(column == 0, 1.0, column / column.mean().clamp_min(1e-30)))
    if activations is not None:
        column = _finer_where_it_matters(column, matrix, activations, terms)
    return column, _row_scales(parts, column)


def _row_scales(parts: Sequence[Tensor], column: Tensor) -> Tensor:
    row = torch.cat([(part.to(torch.float64) / column).abs_().amax(1) for part in parts]) / 127
    return _stored(torch.where(row == 0, 1.0, row))


def _finer_where_it_matters(column: Tensor, matrix: Tensor, activations: Tensor, terms: int) -> Tensor:
    """c_j / a_j^β with the exponent β that leaves the least error Σ (E − Ê)²_ij a_j² in a sample of rows; β = 0 changes nothing."""
    a = activations.clamp_min(1e-3 * float(activations.max().clamp_min(1e-30)))
    a = a / a.log().mean().exp()
    sample = matrix[:: max(1, matrix.shape[0] // _SAMPLED_ROWS)].to(torch.float64)

    def error(c: Tensor) -> float:
        scale = _row_scales([sample], c)
        terms_of = zip(_quantised(sample, c, scale, terms), (1.0, 1 / _SECOND_TERM), strict=False)
        read = sum(codes.to(torch.float64) * unit for codes, unit in terms_of) * scale[:, None] * c
        return float(((sample - read) * a).square().sum())

    candidates = [_stored(column / a**exponent) for exponent in _EXPONENTS]
    return min(candidates, key=error)


def _stored(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).to(torch.float64)


def _quantised(rows: Tensor, column: Tensor, scale: Tensor, terms: int) -> list[Tensor]:
    """Codes of some rows of Ê, one int8 [rows, K] per term."""
    exact = rows.to(torch.float64).div(column).div_(scale[:, None])
    first = exact.round().clamp_(-127, 127)
    codes = [first.to(torch.int8)]
    if terms == 2:
        codes.append(exact.sub_(first).mul_(_SECOND_TERM).round_().clamp_(-127, 127).to(torch.int8))
    return codes
