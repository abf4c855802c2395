from __future__ import annotations

import secrets

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.exposed_matrix import ExposedMatrix, expose

TERMS = (1, 2)


def stream() -> SecretStream:
    return SecretStream(secrets.token_bytes(KEY_BYTES), "test")


def maybe(scramble: bool) -> SecretStream | None:
    return stream() if scramble else None


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


@pytest.mark.parametrize("scramble", [False, True])
@pytest.mark.parametrize("terms", TERMS)
@given(n=st.integers(1, 30), k=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_round_trip_within_the_bound(terms: int, scramble: bool, n: int, k: int, seed: int) -> None:
    matrix = matrix_of(n, k, seed)
    exposed = expose(matrix, terms, maybe(scramble))
    assert bool(((exposed.dequantised() - matrix).abs() <= quantisation_bound(matrix, terms)).all())


def test_the_second_term_buys_eight_bits() -> None:
    matrix = matrix_of(64, 48)
    errors = [float((expose(matrix, terms, stream()).dequantised() - matrix).norm() / matrix.norm()) for terms in TERMS]
    assert errors[0] < 2e-2 and errors[1] < errors[0] / 100


@pytest.mark.parametrize("scramble", [False, True])
@pytest.mark.parametrize("terms", TERMS)
def test_codes_and_shapes(terms: int, scramble: bool) -> None:
    exposed = expose(matrix_of(20, 33), terms, maybe(scramble))
    assert exposed.codes.dtype == torch.int8 and exposed.codes.shape == (terms * 20, 33)
    assert int(exposed.codes.min()) >= -127 and int(exposed.codes.max()) <= 127  # the exact product refuses −128
    assert exposed.column_gather.shape == exposed.column_scale.shape == (33,)
    assert exposed.row_gather.shape == exposed.row_scale.shape == (terms, 20)
    for tensor in (exposed.column_gather, exposed.row_gather):
        assert tensor.dtype == torch.int32
    for tensor in (exposed.column_scale, exposed.row_scale):
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("terms", TERMS)
def test_the_documented_formula(terms: int) -> None:
    """(E x)_i = Σ row_scale[term, i] · (X x')[row_gather[term, i]] with x' = column_scale · x[column_gather]: what the layer computes."""
    exposed = expose(matrix_of(20, 33), terms, stream())
    x = torch.randn(33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = exposed.codes.double() @ (exposed.column_scale.double() * x[exposed.column_gather.long()])
    result = (exposed.row_scale.double() * y[exposed.row_gather.long()]).sum(0)
    assert torch.allclose(result, exposed.dequantised() @ x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("terms", TERMS)
def test_the_scramble_permutes_and_flips_signs_and_nothing_else(terms: int) -> None:
    matrix = matrix_of(20, 33)
    plain, scrambled = expose(matrix, terms, None), expose(matrix, terms, stream())
    rows, columns = scrambled.row_gather.long().flatten(), scrambled.column_gather.long()
    assert rows.sort().values.tolist() == list(range(terms * 20))
    assert columns.sort().values.tolist() == list(range(33))
    ordered = scrambled.codes[rows].int()  # [T·N, K], rows in the model's order
    signs = torch.sign(scrambled.row_scale.flatten()).int()[:, None] * torch.sign(scrambled.column_scale).int()
    assert torch.equal(ordered * signs, plain.codes.int()[:, columns])
    assert torch.equal(scrambled.row_scale.abs(), plain.row_scale) and torch.equal(
        scrambled.column_scale.abs(), plain.column_scale[columns]
    )


def test_the_scramble_is_drawn_afresh_with_both_signs() -> None:
    first, second = (expose(matrix_of(200, 150), 1, stream()) for _ in range(2))
    for one, other in ((first.row_gather, second.row_gather), (first.column_gather, second.column_gather)):
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
    after = torch.linalg.vector_norm(dequantised, dim=0)[exposed.column_gather.long()] / exposed.column_scale.double().abs()
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
    result = expose(matrix, terms, stream()).dequantised()
    assert bool(torch.isfinite(result).all())
    assert bool(((result - matrix).abs() <= quantisation_bound(matrix, terms)).all())


def test_repr_shows_no_values() -> None:
    exposed = expose(matrix_of(4, 3), 1, stream())
    assert repr(exposed) == "ExposedMatrix((4, 3), <secret>)"
    assert isinstance(exposed, ExposedMatrix)
