"""A scrambled matrix as an attacker sees it, and the truth that the attacker is marked by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.slip.exposed_matrix import ExposedMatrix
from cloven.slip.mixing import Mixing


@dataclass(frozen=True, repr=False, eq=False)
class Scrambled:
    """The first int8 term of an exposed matrix, and what its rows and columns are.

    Args:
        codes: as they lie, float32 [N, K]; where rows are mixed, with the rows' own scales, which are nearly equal: a gift.
        rows: row a of the codes is a combination of the model's rows with the coefficients rows[a], float32 [N, N].
        columns: the same of the columns, [K, K]. Where nothing is mixed both are signed permutations.
    """

    codes: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, matrix: ExposedMatrix) -> Scrambled:
        """Of an exposed matrix and its keys."""
        return cls(coarse(matrix), rows_of(matrix), columns_of(matrix))


def in_the_model(basis: Tensor, vectors: Tensor) -> Tensor:
    """Directions of the codes' rows or columns [n, s], as singular vectors are, in the model's coordinates: unit vectors [n, s]."""
    turned: Tensor = torch.linalg.solve(basis, vectors)
    return torch.nn.functional.normalize(turned, dim=0)


def coarse(matrix: ExposedMatrix) -> Tensor:
    """See `Scrambled.codes`; attackers tell terms by their spread."""
    order = matrix.row_gather[0].long().sort()
    codes = matrix.codes[order.values].float()
    if not len(matrix.mixing_scale):
        return codes
    sizes = matrix.row_scale[0].abs()
    return codes * (sizes / sizes.mean())[order.indices, None]


def rows_of(matrix: ExposedMatrix, *, sizes: bool = True) -> Tensor:
    """See `Scrambled.rows`; without the sizes that are mixed in, a rotation."""
    order, scale = matrix.row_gather[0].long().sort(), matrix.mixing_scale.clone()
    if len(scale):
        scale[-1] = _signs(scale[-1])  # the rows' norms are the model's
    mixing = Mixing(matrix.mixing_gather, scale if sizes else _signs(scale))
    one = torch.eye(len(order.indices), dtype=torch.float64)
    rows = torch.from_numpy(mixing.undone(one.numpy())).t()[order.indices]  # R⁻¹
    return (rows * matrix.row_scale[0].sign()[order.indices, None]).float()


def columns_of(matrix: ExposedMatrix, *, sizes: bool = True) -> Tensor:
    """See `Scrambled.columns`; without the sizes that are mixed in, a rotation."""
    gather, scale = matrix.column_gather, matrix.column_scale
    mixing = Mixing(gather[1:], scale[1:] if sizes else _signs(scale[1:]))
    columns = torch.eye(gather.shape[1], dtype=torch.float64)[:, gather[0].long()] * _signs(scale[0])
    return torch.from_numpy(mixing.undone_on_rows(columns.contiguous().numpy())).t().float().contiguous()


def sizes_of(matrix: ExposedMatrix) -> tuple[Tensor, Tensor]:
    """Scales of the model's rows [N] and columns [K], without signs."""
    columns = torch.empty(matrix.codes.shape[1])
    columns[matrix.column_gather[0].long()] = matrix.column_scale[0].abs()
    if len(matrix.mixing_scale):  # the mixed rows' own scales are in `coarse`
        return matrix.mixing_scale[-1].abs() * matrix.row_scale[0].abs().mean(), columns
    return matrix.row_scale[0].abs(), columns


def _signs(scale: Tensor) -> Tensor:
    """±1; of rows and columns that hold nothing, too."""
    return torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)


def share_of(match: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """How much of our vectors was found: the mean squared cosine of vector i of ours and vector match[i] of theirs, [n, m] each.

    A share of places where both are signed permutations; 1 / m by chance.
    """
    return float(torch.nn.functional.cosine_similarity(ours, theirs[match], dim=1).square().mean())
