from __future__ import annotations

import secrets

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.exposed_matrix import ExposedMatrix, expose
from cloven.slip.mixing import Mixing

TERMS = (1, 2)
SCRAMBLES = ("none", "permutation", "mixing")


def stream() -> SecretStream:
    return SecretStream(secrets.token_bytes(KEY_BYTES), "test")


def exposed_by(matrix: Tensor, terms: int, scramble: str) -> ExposedMatrix:
    return expose(matrix, terms, None if scramble == "none" else stream(), mixed=scramble == "mixing")


def matrix_of(n: int, k: int, seed: int = 0) -> Tensor:
    """A matrix with rows and columns of very different sizes, as real layers have them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 1, dtype=torch.float64, generator=generator).exp()
    columns = torch.randn(1, k, dtype=torch.float64, generator=generator).exp()
    return torch.randn(n, k, dtype=torch.float64, generator=generator) * rows * columns


def quantisation_bound(matrix: Tensor, terms: int) -> Tensor:
    """Per entry: half a step of the last term, in the units of the row and the column; 1e-6 more for the float32 scales."""
    norms = torch.linalg.vector_norm(matrix, dim=0)
    column = torch.where(norms == 0, 1.0, norms / norms.mean())
    step = (matrix / column).abs().amax(1, keepdim=True) / 127 / (1 if terms == 1 else 254)
    return (0.5 * step + 127 * step * (1 if terms == 1 else 254) * 1e-6) * column


@pytest.mark.parametrize("scramble", ["none", "permutation"])
@pytest.mark.parametrize("terms", TERMS)
@given(n=st.integers(1, 30), k=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_round_trip_within_the_bound(terms: int, scramble: str, n: int, k: int, seed: int) -> None:
    matrix = matrix_of(n, k, seed)
    exposed = exposed_by(matrix, terms, scramble)
    assert bool(((exposed.dequantised() - matrix).abs() <= quantisation_bound(matrix, terms)).all())


@pytest.mark.parametrize("terms", TERMS)
@given(n=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_a_mixed_round_trip_within_the_bound(terms: int, n: int, k: int, seed: int) -> None:
    """Mixing is orthogonal but for its sizes: the error of all entries, in units of their rows and columns, is half a step in each code,
    times the largest sizes."""
    matrix, before = matrix_of(n, k, seed), matrix_of(n, k, seed)
    exposed = exposed_by(matrix, terms, "mixing")
    rows, columns = exposed.mixing_scale[-1].double().abs(), torch.empty(k, dtype=torch.float64)
    columns[exposed.column_gather[0].long()] = exposed.column_scale[0].double().abs()
    error = (exposed.dequantised() - matrix) / rows[:, None] / columns
    step = exposed.row_scale[-1].double().abs()
    sizes = float(exposed.column_scale[1:].abs().max() * exposed.mixing_scale[:-1].abs().max())
    assert sizes < 2.72  # e
    assert float(error.norm()) <= 0.5 * float(step.norm()) * k**0.5 * sizes * 1.01 + 1e-5 * (n * k) ** 0.5
    assert torch.equal(matrix, before)


def test_mixing_costs_little_precision() -> None:
    matrix = matrix_of(300, 200)
    errors = {one: (exposed_by(matrix, 1, one).dequantised() - matrix).norm(dim=1) / matrix.norm(dim=1) for one in SCRAMBLES}
    assert float(errors["mixing"].mean()) < 1.5 * float(errors["permutation"].mean())
    assert float(errors["mixing"].max()) < 4 * float(errors["mixing"].median())  # small rows are not drowned by large ones


def test_the_second_term_buys_eight_bits() -> None:
    matrix = matrix_of(64, 48)
    errors = [float((expose(matrix, terms, stream()).dequantised() - matrix).norm() / matrix.norm()) for terms in TERMS]
    assert errors[0] < 2e-2 and errors[1] < errors[0] / 100


@pytest.mark.parametrize("scramble", SCRAMBLES)
@pytest.mark.parametrize("terms", TERMS)
def test_codes_and_shapes(terms: int, scramble: str) -> None:
    exposed = exposed_by(matrix_of(20, 33), terms, scramble)
    assert exposed.codes.dtype == torch.int8 and exposed.codes.shape == (terms * 20, 33)
    assert int(exposed.codes.min()) >= -127 and int(exposed.codes.max()) <= 127  # the exact product refuses −128
    rounds = 3 if scramble == "mixing" else 0
    assert exposed.column_gather.shape == exposed.column_scale.shape == (1 + rounds, 33)
    assert exposed.mixing_gather.shape == exposed.mixing_scale.shape == (rounds, 20)
    assert exposed.row_gather.shape == exposed.row_scale.shape == (terms, 20)
    for tensor in (exposed.column_gather, exposed.row_gather, exposed.mixing_gather):
        assert tensor.dtype == torch.int32
    for tensor in (exposed.column_scale, exposed.row_scale, exposed.mixing_scale):
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("scramble", SCRAMBLES)
@pytest.mark.parametrize("terms", TERMS)
def test_the_documented_formula(terms: int, scramble: str) -> None:
    """f_i = Σ row_scale[term, i] · (X x')[row_gather[term, i]] with x' = C (column_scale · x[column_gather]), E x = R f."""
    exposed = exposed_by(matrix_of(20, 33), terms, scramble)
    x = torch.randn(33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gather, scale = exposed.column_gather, exposed.column_scale
    first = (scale[0].double() * x[gather[0].long()])[None]
    y = exposed.codes.double() @ torch.from_numpy(Mixing(gather[1:], scale[1:]).apply(first.numpy()))[0]
    f = (exposed.row_scale.double() * y[exposed.row_gather.long()]).sum(0)
    result = torch.from_numpy(Mixing(exposed.mixing_gather, exposed.mixing_scale).apply(f[None].numpy()))[0]
    assert torch.allclose(result, exposed.dequantised() @ x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("terms", TERMS)
def test_the_scramble_permutes_and_flips_signs_and_nothing_else(terms: int) -> None:
    matrix = matrix_of(20, 33)
    plain, scrambled = expose(matrix, terms, None), expose(matrix, terms, stream())
    rows, columns = scrambled.row_gather.long().flatten(), scrambled.column_gather[0].long()
    assert rows.sort().values.tolist() == list(range(terms * 20))
    assert columns.sort().values.tolist() == list(range(33))
    ordered = scrambled.codes[rows].int()  # [T·N, K], rows in the model's order
    signs = torch.sign(scrambled.row_scale.flatten()).int()[:, None] * torch.sign(scrambled.column_scale[0]).int()
    assert torch.equal(ordered * signs, plain.codes.int()[:, columns])
    assert torch.equal(scrambled.row_scale.abs(), plain.row_scale)
    assert torch.equal(scrambled.column_scale[0].abs(), plain.column_scale[0][columns])


def test_the_scramble_is_drawn_afresh_with_both_signs() -> None:
    first, second = (expose(matrix_of(200, 150), 1, stream()) for _ in range(2))
    for one, other in ((first.row_gather, second.row_gather), (first.column_gather[0], second.column_gather[0])):
        assert int((one == other).sum()) < 20  # one position agrees on average
    for scale in (first.row_scale, first.column_scale):
        assert 0.3 < float((scale > 0).double().mean()) < 0.7
    assert not torch.equal(torch.sign(first.row_scale), torch.sign(second.row_scale))


@pytest.mark.parametrize("terms", TERMS)
def test_column_norms_are_equal(terms: int) -> None:
    """An attacker would align columns by their norms: the real matrix's differ by a factor of more than ten, the exposed one's do not."""
    matrix = matrix_of(256, 64)
    matrix = matrix / matrix.norm(dim=1, keepdim=True)  # rows of one scale, so that the codes' norms show the columns'
    exposed = expose(matrix, terms, stream())
    before = torch.linalg.vector_norm(matrix, dim=0)
    assert float(before.max() / before.min()) > 10
    dequantised = exposed.dequantised()
    after = torch.linalg.vector_norm(dequantised, dim=0)[exposed.column_gather[0].long()] / exposed.column_scale[0].double().abs()
    assert float(after.max() / after.min()) < 1.02


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("what", ["a zero row", "a zero column", "zeros", "tiny", "huge"])
def test_degenerate_matrices(terms: int, what: str) -> None:
    matrix = matrix_of(12, 9)
    if what == "a zero row":
        matrix[3] = 0
    elif what == "a zero column":
        matrix[:, 4] = 0
    else:
        matrix *= {"zeros": 0.0, "tiny": 1e-30, "huge": 1e30}[what]
    result, mixed = (exposed_by(matrix, terms, one).dequantised() for one in ("permutation", "mixing"))
    assert bool(torch.isfinite(result).all()) and bool(torch.isfinite(mixed).all())
    assert bool(((result - matrix).abs() <= quantisation_bound(matrix, terms)).all())
    assert float((mixed - matrix).norm()) <= 0.02 * float(matrix.norm())
    if what == "a zero row":
        assert not mixed[3].any()


@pytest.mark.parametrize("terms", TERMS)
def test_rows_and_columns_of_zeros_are_no_null_vectors_of_the_codes(terms: int) -> None:
    """Else a zero column's image under the mixing would be the one direction in which the codes hold nothing."""
    matrix = matrix_of(80, 40)
    matrix[:, [3, 17]] = 0
    matrix[[5, 60]] = 0
    exposed = exposed_by(matrix, terms, "mixing")
    values = torch.linalg.svdvals(exposed.codes[exposed.row_gather[0].long()].double())
    assert float(values[-1]) > 0.02 * float(values[0])
    back = exposed.dequantised()
    assert not back[:, [3, 17]].any() and not back[[5, 60]].any()
    assert float((back - matrix).norm()) < 0.02 * float(matrix.norm())
    weaker = torch.linalg.svdvals((matrix / matrix.norm(dim=0).clamp_min(1e-9)).double())
    assert float(weaker[-1]) < 1e-9


def test_repr_shows_no_values() -> None:
    exposed = expose(matrix_of(4, 3), 1, stream())
    assert repr(exposed) == "ExposedMatrix((4, 3), <secret>)"
    assert isinstance(exposed, ExposedMatrix)
