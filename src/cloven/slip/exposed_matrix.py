"""From the exposed parts of a group's matrices to the int8 matrix that a worker holds, and back.

    E = [E_1; E_2; …]                       stacked [N, K]
    Ê = E diag(c)^-1                        columns equalised: c_j = ‖E_·j‖ / mean; the trusted process multiplies x by c
    F = R⁻¹ diag(n)^-1 Ê (C S)^-1           mixed: R, C secret mixings (`cloven.slip.mixing`), S a secret signed permutation, n_i = ‖Ê_i·‖
    F_i ≈ r_i (q1_i + q2_i / 254)           rows quantised, |q| ≤ 127; the second term only with int8x2
    X[a] = s_a Q[ρ(a)],  Q = [q1; q2]       [T·N, K], T terms, rows permuted and flipped: this is exposed

With x' = C S diag(c) x the worker's X x' holds the terms of F x', so that

    f_i = Σ_terms row_scale[term, i] · (X x')[row_gather[term, i]],        E x = diag(n) R f

where signs, r and 1/254 are folded in `row_scale`, and n in R's last scales. With scramble "permutation" R = C = I, n = 1, and S follows
the quantisation; with "none" nothing is secret. Scales, permutations and signs stay trusted. The scramble is a heuristic of ours,
attacked by the audit; column norms are equalised because an attacker would align by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.field.hadamard import Rows
from cloven.field.prg import SecretStream
from cloven.slip.mixing import COLUMNS, ROWS, Mixing

_SECOND_TERM = 254  # |remainder| ≤ ½, times 254 ≤ 127
_ENTRIES_AT_A_TIME = 2**21
_COLUMNS_AT_A_TIME = 2**18  # entries
_SAMPLED_ROWS = 256
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class ExposedMatrix:
    """A group's exposed matrix and what the trusted process needs to use it.

    codes int8 [T·N, K] (exposed); column_gather int32 [1 + rounds, K], column_scale float32 [1 + rounds, K]: S and C; row_gather int32
    [T, N], row_scale float32 [T, N]; mixing_gather int32 [rounds, N], mixing_scale float32 [rounds, N]: R (secret).
    """

    codes: Tensor
    column_gather: Tensor
    column_scale: Tensor
    row_gather: Tensor
    row_scale: Tensor
    mixing_gather: Tensor
    mixing_scale: Tensor

    def __repr__(self) -> str:
        return f"ExposedMatrix({tuple(self.codes.shape)}, <secret>)"

    def dequantised(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """E [N, K] as the trusted process reads it: undoes the scramble and the quantisation, some rows and columns at a time."""
        n, k = self.row_gather.shape[1], self.codes.shape[1]
        matrix = torch.empty(n, k, dtype=dtype)
        columns = Mixing(self.column_gather[1:], self.column_scale[1:])
        gather, scale = self.column_gather[0].long(), self.column_scale[0].to(torch.float64)
        step = rows_at_a_time(k)
        for first in range(0, n, step):
            part = slice(first, min(first + step, n))
            scrambled = torch.zeros(part.stop - first, k, dtype=torch.float64)
            for places, units in zip(self.row_gather[:, part], self.row_scale[:, part], strict=True):
                scrambled += self.codes[places.long()].to(torch.float64) * units.to(torch.float64)[:, None]
            rows = torch.from_numpy(columns.transposed(scrambled.numpy())) * scale
            matrix[part, gather] = rows.to(dtype)
        mixing = Mixing(self.mixing_gather, self.mixing_scale)
        _on_columns(matrix, mixing.apply)
        return matrix


def expose(
    matrix: Tensor,
    terms: int,
    stream: SecretStream | None,
    reference: Tensor | None = None,
    activations: Tensor | None = None,
    *,
    mixed: bool = False,
) -> ExposedMatrix:
    """Equalise, mix, quantise and scramble a stacked matrix, some rows at a time: memory is that of the codes, and of the mixed matrix.

    Args:
        matrix: E, float64 or float32 [N, K]; left as it is.
        terms: number of int8 terms, 1 or 2.
        stream: secret randomness for the scramble; None leaves rows and columns in place.
        reference: take the scales from this matrix instead; what of E exceeds them is clipped. For a public base: the scales then say
            nothing of the secret.
        activations: root mean squares of x, float64 [K], > 0 somewhere: columns that meet large activations are then quantised finer.
        mixed: mix rows and columns, besides permuting them; needs a stream, and no reference.
    """
    n, k = matrix.shape
    columns, rows_mixing = Mixing.none(k), Mixing.none(n)
    gather, column_sign = torch.arange(k), torch.ones(k, dtype=torch.float64)
    rho, row_sign = torch.arange(terms * n), torch.ones(terms * n, dtype=torch.float64)
    if stream is not None:
        rho, row_sign = stream.permutation(terms * n), stream.signs(terms * n)
        gather, column_sign = stream.permutation(k), stream.signs(k)
        if mixed:
            columns, rows_mixing = Mixing.fresh(k, stream, COLUMNS), Mixing.fresh(n, stream, ROWS)
    like = matrix if reference is None else reference
    column = _column_scale(like)
    if activations is not None:
        column = _finer_where_it_matters(column, matrix, activations, terms, columns)
    step = rows_at_a_time(k)
    if mixed:
        assert stream is not None
        empty = _empty_columns(matrix)
        matrix, norms = _mixed(matrix, column, empty, (gather, column_sign), columns, rows_mixing, stream)
        column = torch.where(empty, 0.0, column)
        scale = _row_scales(matrix.split(step), None)
        rows_mixing = rows_mixing.scaled(norms)
    else:
        scale = _row_scales(like.split(step), column)
    rows = torch.argsort(rho).view(terms, n)  # ρ^-1
    codes = torch.empty(terms * n, k, dtype=torch.int8)
    flips = column_sign.to(torch.int8)
    for first in range(0, n, step):
        part = slice(first, first + step)
        quantised = _quantised(matrix[part], None if mixed else column, scale[part], terms)
        for places, term in zip(rows[:, part], quantised, strict=True):
            codes[places] = (term if mixed else term[:, gather].mul_(flips)).mul_(row_sign[places].to(torch.int8)[:, None])
    units = torch.tensor([1.0, 1 / _SECOND_TERM], dtype=torch.float64)[:terms, None]
    return ExposedMatrix(
        codes,
        torch.cat([gather.to(torch.int32)[None], columns.gather]),
        torch.cat([(column[gather] * column_sign).to(torch.float32)[None], columns.scale]),
        rows.to(torch.int32).contiguous(),
        (scale * units * row_sign[rows]).to(torch.float32).contiguous(),
        rows_mixing.gather,
        rows_mixing.scale,
    )


def _empty_columns(matrix: Tensor) -> Tensor:
    """Which columns hold nothing, bool [K]."""
    return torch.stack([part.abs().amax(0) for part in matrix.split(rows_at_a_time(matrix.shape[1]))]).amax(0) == 0


def _mixed(
    matrix: Tensor, column: Tensor, empty: Tensor, signed: tuple[Tensor, Tensor], columns: Mixing, rows: Mixing, stream: SecretStream
) -> tuple[Tensor, Tensor]:
    """F [N, K] in the dtype of E, and n [N].

    Rows and columns of zeros would be null vectors of F, and tell what the mixings make of them: they are filled with noise, which the
    trusted process multiplies with zero.
    """
    flat, norms = torch.empty_like(matrix), torch.empty(len(matrix), dtype=torch.float64)
    (gather, sign), step = signed, rows_at_a_time(matrix.shape[1])
    for first in range(0, len(matrix), step):
        part = slice(first, first + step)
        equal = matrix[part].to(torch.float64) / column
        largest = equal.abs().amax(1)  # squares may overflow, or vanish
        norms[part] = _stored(largest * (equal / largest.clamp_min(1e-300)[:, None]).square_().mean(1).sqrt_())
        unit = equal / torch.where(norms[part] == 0, 1.0, norms[part])[:, None]
        if bool(empty.any()):
            unit[:, empty] = stream.normal(len(unit), int(empty.sum())).double()
        if not bool(norms[part].all()):
            nothing = norms[part] == 0
            unit[nothing] = stream.normal(int(nothing.sum()), unit.shape[1]).double()
        flat[part] = torch.from_numpy(columns.undone_on_rows((unit[:, gather] * sign).numpy())).to(flat.dtype)
    _on_columns(flat, rows.undone)
    return flat, norms


def _on_columns(matrix: Tensor, change: Callable[[Rows], Rows]) -> None:
    """Every column v of a matrix [N, K] becomes change(v), some columns at a time."""
    step = max(1, _COLUMNS_AT_A_TIME // matrix.shape[0])
    for first in range(0, matrix.shape[1], step):
        part = matrix[:, first : first + step]
        part.copy_(torch.from_numpy(change(part.t().to(torch.float64).contiguous().numpy())).t())


def rows_at_a_time(columns: int) -> int:
    """Rows whose float64 intermediates stay small, whatever the matrix's size."""
    return max(1, _ENTRIES_AT_A_TIME // columns)


def _column_scale(matrix: Tensor) -> Tensor:
    """c [K], float64 with values that float32 holds: what is stored is what the codes were made with."""
    parts = matrix.split(rows_at_a_time(matrix.shape[1]))
    largest = torch.stack([part.abs().max() for part in parts]).max().to(torch.float64).clamp_min(1e-300)  # its square may overflow
    squares = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for part in parts:
        squares += (part.to(torch.float64) / largest).square_().sum(0)
    column = squares.sqrt_()
    return _stored(torch.where(column == 0, 1.0, column / column.mean().clamp_min(1e-30)))


def _row_scales(parts: Sequence[Tensor], column: Tensor | None) -> Tensor:
    """r [N], in the same way."""
    row = torch.cat([_over(part.to(torch.float64), column).abs().amax(1) for part in parts]) / 127
    return _stored(torch.where(row == 0, 1.0, row))


def _over(rows: Tensor, column: Tensor | None) -> Tensor:
    return rows if column is None else rows / column


def _finer_where_it_matters(column: Tensor, matrix: Tensor, activations: Tensor, terms: int, columns: Mixing) -> Tensor:
    """c_j / a_j^β with the exponent β that leaves the least error Σ (E − Ê)²_ij a_j² in a sample of rows; β = 0 changes nothing."""
    a = activations.clamp_min(1e-3 * float(activations.max().clamp_min(1e-30)))
    a = a / a.log().mean().exp()
    sample = matrix[:: max(1, matrix.shape[0] // _SAMPLED_ROWS)].to(torch.float64)

    def error(c: Tensor) -> float:
        rows = torch.from_numpy(columns.undone_on_rows((sample / c).numpy()))
        scale = _row_scales([rows], None)
        terms_of = zip(_quantised(rows, None, scale, terms), (1.0, 1 / _SECOND_TERM), strict=False)
        read = sum(codes.to(torch.float64) * unit for codes, unit in terms_of) * scale[:, None]
        assert isinstance(read, Tensor)
        back = torch.from_numpy(columns.transposed(read.numpy())) * c
        return float(((sample - back) * a).square().sum())

    candidates = [_stored(column / a**exponent) for exponent in _EXPONENTS]
    return min(candidates, key=error)


def _stored(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).to(torch.float64)


def _quantised(rows: Tensor, column: Tensor | None, scale: Tensor, terms: int) -> list[Tensor]:
    """Codes of some rows of Ê or F, one int8 [rows, K] per term."""
    exact = _over(rows.to(torch.float64), column) / scale[:, None]
    first = exact.round().clamp_(-127, 127)
    codes = [first.to(torch.int8)]
    if terms == 2:
        codes.append(exact.sub_(first).mul_(_SECOND_TERM).round_().clamp_(-127, 127).to(torch.int8))
    return codes
