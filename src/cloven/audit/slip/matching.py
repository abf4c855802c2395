"""Matching the rows or columns of two matrices whose order, and whose signs, are secret."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.errors import BadInput

POINTS = 128  # of a profile
_ROUNDS = 12
_SURE = 0.5  # mean |cos| of matched rows above which an alignment has found itself
_HEAT = torch.linspace(2, 16, 30)  # Sinkhorn's inverse temperatures
_SWEEPS = 12
_STEPS, _SMALL = 4, 512  # of rotations, and dimensions up to which there are so many


@dataclass(frozen=True, repr=False)
class Known:
    """Vectors whose partners somebody gave away: places int64 [s] in both lists, and whether the partner points the same way, ±1 [s]."""

    first: Tensor
    second: Tensor
    signs: Tensor


@dataclass(frozen=True, repr=False)
class Alignment:
    """Where the rows and columns of a scrambled matrix [n, m] lie in a reference: places int64 [n] and [m], signs ±1 float32."""

    rows: Tensor
    columns: Tensor
    row_signs: Tensor
    column_signs: Tensor

    def applied(self, scrambled: Tensor) -> Tensor:
        """The matrix in the reference's order and signs."""
        placed = torch.empty_like(scrambled)
        placed[self.rows[:, None], self.columns[None]] = scrambled * self.row_signs[:, None] * self.column_signs
        return placed


def profiles(vectors: Tensor) -> Tensor:
    """What a vector keeps when its entries are permuted and flipped: sorted magnitudes over its norm, at 128 points; [n, m] -> [n, 128]."""
    ordered = vectors.float().abs().sort(1).values
    ordered = ordered / ordered.norm(dim=1, keepdim=True).clamp_min(1e-30) * vectors.shape[1] ** 0.5
    return torch.nn.functional.interpolate(ordered[:, None], POINTS, mode="linear", align_corners=True)[:, 0]


def cosines(vectors: Tensor) -> Tensor:
    """|cos| of every pair of vectors [n, m]: free of signs, and of the order of their entries; [n, n]."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    return (unit @ unit.t()).abs()


def assigned(likeness: Tensor) -> Tensor:
    """The one-to-one assignment with the largest sum: likeness [n, n] -> for each row its column, int64 [n].

    Raises:
        BadInput: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise BadInput("attacks on the scramble need SciPy: pip install 'cloven[audit]'") from error
    return torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])


def by_profiles(a: Tensor, b: Tensor) -> Tensor:
    """For every vector of a its partner among b, [n, ·] each, by magnitudes: int64 [n]."""
    return assigned(-torch.cdist(profiles(a), profiles(b)))


def by_graph(a: Tensor, b: Tensor) -> Tensor:
    """The same by the graphs of their cosines: quadratic assignment by Frank-Wolfe steps, from the profiles of the graphs' rows on."""
    first, second = (cosines(vectors).fill_diagonal_(0) for vectors in (a, b))
    match = by_profiles(first, second)
    value = float((first * second[match][:, match]).sum())
    for _ in range(_ROUNDS):
        following = assigned(first @ second[match])  # the gradient of the value
        reached = float((first * second[following][:, following]).sum())
        if reached <= value:
            break
        match, value = following, reached
    return match


def by_known(a: Tensor, b: Tensor, known: Known) -> Tensor:
    """For every vector of a its partner among b, from a few that are known: by cosines with these, signs included, then with all that
    were found (Frank-Wolfe steps on the signed graphs)."""
    first, second = (_signed_cosines(vectors) for vectors in (a, b))
    match, signs = torch.zeros(len(first), dtype=torch.int64), torch.zeros(len(first))
    match[known.first], signs[known.first] = known.second, known.signs
    value = -float("inf")
    for _ in range(_ROUNDS):
        gradient = (first * signs) @ second[match]
        following = assigned(gradient.abs())
        pointing = torch.where(gradient[torch.arange(len(first)), following] < 0, -1.0, 1.0)
        following[known.first], pointing[known.first] = known.second, known.signs
        reached = float((first * second[following][:, following] * pointing[:, None] * pointing).sum())
        if reached <= value:
            break
        match, signs, value = following, pointing, reached
    return match


def by_eigenvectors(matrix: Tensor) -> Tensor:
    """The eigenvectors of the Gram matrix of a matrix's columns, in the order of eigenvalues: [n, h] -> [h, h], one to a column."""
    vectors: Tensor = torch.linalg.eigh(matrix.double().t() @ matrix.double())[1]
    return vectors.float()


def by_known_directions(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    """Maps Q [h, h], rotations but for what is known, that take known directions [h, s] of a [n, h] to those of b [m, h]: candidates.

    Eigenvectors of both Gram matrices are told apart by what they have of the known directions, where their places in the spectrum are
    near each other, for several widths; then tr(B Q A Qᵀ) of the matrices' roots is raised by polar steps.
    """
    roots = [_root(one.double()) for one in (a, b)]
    (va, vb), h = (torch.linalg.eigh(root)[1] for root in roots), len(roots[0])
    known, images = first.double(), second.double()
    rest, other = (torch.linalg.qr(one, mode="complete")[0][:, one.shape[1] :] for one in (known, images))
    fixed, place = images @ torch.linalg.pinv(known), torch.arange(h, dtype=torch.float64)

    def polar(gradient: Tensor) -> Tensor:
        u, _, vt = torch.linalg.svd(other.t() @ gradient @ rest)
        turned: Tensor = fixed + other @ (u @ vt) @ rest.t()
        return turned

    candidates = []
    for width in (h / 32, h / 8, h):
        near = torch.exp(-(((place[:, None] - place) / width) ** 2) / 2)
        rotation = fixed
        for _ in range(_STEPS if h <= _SMALL else 1):
            rotation = polar(vb @ ((vb.t() @ rotation @ va) * near) @ va.t())
        candidates.append(rotation.float())
        for _ in range(_STEPS if h <= _SMALL else 1):
            rotation = polar(roots[1] @ rotation @ roots[0])
        candidates.append(rotation.float())
    return candidates


def _root(matrix: Tensor) -> Tensor:
    """(MᵀM)^½, less its mean: what a rotation turns along. Columns stay as long as they are: their lengths depend on the basis."""
    values, vectors = torch.linalg.eigh(matrix.t() @ matrix)
    sizes = values.clamp_min(0).sqrt()
    root: Tensor = (vectors * (sizes / sizes.mean() - 1)) @ vectors.t()
    return root


def _signed_cosines(vectors: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    return (unit @ unit.t()).fill_diagonal_(0)


def doubly_stochastic(likeness: Tensor) -> Tensor:
    """exp(likeness) [n, n], scaled until rows and columns sum to one (Sinkhorn)."""
    kernel = (likeness - likeness.amax(1, keepdim=True)).exp().clamp_min(1e-30)
    right = kernel.new_ones(len(kernel))
    for _ in range(_SWEEPS):
        left = 1 / (kernel @ right)
        right = 1 / (left @ kernel)
    return left[:, None] * kernel * right


def aligned_to(scrambled: Tensor, reference: Tensor) -> Alignment:
    """Align rows, columns and signs, all unknown, with a reference [n, m], by alternating: given the columns, rows are matched by their
    directions, and the other way round. Begins with the profiles; where that leads nowhere, with the graph of one side, which the other
    follows by its magnitudes; at last with soft permutations of the magnitudes, heated up from the profiles on (mean-field steps on the
    squared distance, projected by Sinkhorn). The most alike of them counts."""
    x, r = (torch.nn.functional.normalize(matrix.float(), dim=1) for matrix in (scrambled, reference))
    a, b = (matrix.abs() - matrix.abs().mean() for matrix in (x, r))

    def rows_first() -> tuple[Tensor, Tensor]:
        rows = by_graph(x, r)
        return rows, assigned(a.t() @ b[rows])

    def columns_first() -> tuple[Tensor, Tensor]:
        columns = by_graph(x.t(), r.t())
        return assigned(a @ b[:, columns].t()), columns

    best, likeness = _alternating(x, r, by_profiles(x, r), by_profiles(x.t(), r.t()))
    for start in (rows_first, columns_first, lambda: _softly(a, b, x, r)):
        if likeness >= _SURE:
            break
        other, reached = _alternating(x, r, *start())
        if reached > likeness:
            best, likeness = other, reached
    return best


def _softly(a: Tensor, b: Tensor, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    distance = torch.cdist(profiles(x.t()), profiles(r.t()))
    columns = doubly_stochastic(-6 * distance / distance.std().clamp_min(1e-30))
    for heat in _HEAT:
        gradient = (a @ columns) @ b.t()
        rows = doubly_stochastic(heat * gradient / gradient.std().clamp_min(1e-30))
        gradient = (a.t() @ rows) @ b
        columns = doubly_stochastic(heat * gradient / gradient.std().clamp_min(1e-30))
    return assigned(rows), assigned(columns)


def _alternating(x: Tensor, r: Tensor, rows: Tensor, columns: Tensor) -> tuple[Alignment, float]:
    for _ in range(_ROUNDS):
        column_signs = _column_signs(x, r[rows][:, columns])
        placed = torch.empty_like(x)
        placed[:, columns] = x * column_signs
        cosine = placed @ r.t()
        following = assigned(cosine.abs())
        found = cosine[torch.arange(len(x)), following]
        row_signs = torch.where(found < 0, -1.0, 1.0)
        back = torch.empty_like(x)
        back[following] = x * row_signs[:, None]
        products = back.t() @ r
        next_columns = assigned(products.abs())
        settled = torch.equal(following, rows) and torch.equal(next_columns, columns)
        rows, columns = following, next_columns
        if settled:
            break
    column_signs = torch.where(products[torch.arange(len(columns)), columns] < 0, -1.0, 1.0)
    return Alignment(rows, columns, row_signs, column_signs), float(found.abs().mean())


def _column_signs(x: Tensor, r: Tensor) -> Tensor:
    """x ≈ s tᵀ ∘ r: t is the sign of the first right singular vector of x ∘ r."""
    product = x * r
    vector = product.abs().mean(0)
    for _ in range(30):
        vector = product.t() @ (product @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    return torch.where(vector < 0, -1.0, 1.0)


def spread_evenly(vectors: Tensor, rounds: int = 30) -> Tensor:
    """Unit vectors in the one basis (up to a rotation) in which they point nowhere in particular: Tyler's estimator.

    The same for X and for D X M, whatever the row scales D and the basis M are: [n, h] -> [n, h].
    """
    x = vectors.double()
    whitening = torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(rounds):
        y = torch.nn.functional.normalize(x @ whitening, dim=1)
        values, basis = torch.linalg.eigh(y.t() @ y * (y.shape[1] / y.shape[0]))
        whitening = whitening @ basis @ torch.diag(values.clamp_min(1e-9).rsqrt()) @ basis.t()
    return torch.nn.functional.normalize(x @ whitening, dim=1).float()
