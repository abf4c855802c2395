from __future__ import annotations

import secrets

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.errors import VerificationFailed
from cloven.field.freivalds import CHECKS, Freivalds, image_of
from cloven.field.products import Float64
from cloven.field.residues import H, P
from cloven.field.selection import select_backend
from tests.helpers import CPU, centred, python_product, random_codes, random_residues, verifier

M, N, K = 4, 9, 12
W = random_codes(N, K)
C = random_residues(M, K)
Z = python_product(C, W)


def refused(check: Freivalds, c: Tensor, z: Tensor) -> None:
    with pytest.raises(VerificationFailed, match="layer 3's answer is wrong in"):
        check.check(c, z, "layer 3's answer")


def test_every_single_element() -> None:
    check = verifier(W)
    check.check(C, Z, "honest")
    for row in range(M):
        for column in range(N):
            for change in (1, -1, 2**16, 2**30, secrets.randbelow(P - 1) + 1):
                z = Z.clone()
                z[row, column] = centred(int(z[row, column]) + change)
                with pytest.raises(VerificationFailed, match=f"x is wrong in 1 of {M} rows"):
                    check.check(C, z, "x")


def test_whole_answers_that_are_wrong() -> None:
    check = verifier(W)
    older = python_product(random_residues(M, K, seed=5), W)
    other_matrix = python_product(C, random_codes(N, K, seed=6))
    swapped = Z[[1, 0, 2, 3]]
    scaled = torch.tensor([[centred(2 * v) for v in row] for row in Z.tolist()], dtype=torch.int32)
    columns_rolled = Z.roll(1, 1)
    for wrong in (older, other_matrix, swapped, scaled, -Z, columns_rolled, torch.zeros_like(Z), torch.full_like(Z, H)):
        refused(check, C, wrong)
    refused(check, random_residues(M, K, seed=5), Z)  # the right answer to another question


@given(st.data())
def test_honest_answers_are_accepted(data: st.DataObject) -> None:
    m, n, k = (data.draw(st.integers(1, 8), label=name) for name in "mnk")
    residue = st.integers(-H, H) | st.sampled_from([H, -H, 0, 2**15, -(2**15), 2**16, 2**15 - 1])
    c = torch.tensor(data.draw(st.lists(st.lists(residue, min_size=k, max_size=k), min_size=m, max_size=m)), dtype=torch.int32)
    s = torch.tensor(data.draw(st.lists(st.lists(residue, min_size=n, max_size=n), min_size=CHECKS, max_size=CHECKS)), dtype=torch.int32)
    w = random_codes(n, k, data.draw(st.integers(0, 100)))
    backend = Float64(CPU)
    Freivalds(s, backend, backend.place(w)).check(c, python_product(c, w), "honest")


def residual(s: Tensor, c: Tensor, z: Tensor) -> list[list[int]]:
    """S (z − W c) mod p by Python integers: what the check must find to be zero."""
    difference = [
        [a - b for a, b in zip(got, right, strict=True)] for got, right in zip(z.tolist(), python_product(c, W).tolist(), strict=True)
    ]
    return [[sum(a * b for a, b in zip(key, row, strict=True)) % P for key in s.tolist()] for row in difference]


def in_the_kernel(s: list[list[int]]) -> list[int]:
    """δ ≠ 0 with S δ = 0 mod p: the cross product of the first three columns' rows."""
    (a, b, c), (d, e, f) = (row[:3] for row in s)
    return [centred(b * f - c * e), centred(c * d - a * f), centred(a * e - b * d)] + [0] * (N - 3)


@given(st.lists(st.lists(st.integers(-H, H), min_size=N, max_size=N), min_size=CHECKS, max_size=CHECKS))
def test_the_residual_is_exact(key: list[list[int]]) -> None:
    # whoever knows S can build a wrong answer whose residual is zero: an exact check accepts it, one with any rounding would not
    s = torch.tensor(key, dtype=torch.int32)
    backend = Float64(CPU)
    check = Freivalds(s, backend, backend.place(W))
    forged = Z.clone()
    forged[2] = torch.tensor([centred(a + b) for a, b in zip(Z[2].tolist(), in_the_kernel(key), strict=True)], dtype=torch.int32)
    assert residual(s, C, forged) == [[0, 0]] * M
    check.check(C, forged, "forged with the key")
    off_by_one = forged.clone()
    off_by_one[2, 5] = centred(int(off_by_one[2, 5]) + 1)
    if residual(s, C, off_by_one)[2] != [0, 0]:
        refused(check, C, off_by_one)
    else:
        check.check(C, off_by_one, "this key does not see it")


def test_one_of_two_residuals_is_not_enough() -> None:
    # a forger who knew only the first row of S could pass that one
    s = torch.tensor([[1] * N, list(range(1, N + 1))], dtype=torch.int32)
    backend = Float64(CPU)
    forged = Z.clone()
    forged[0, 0], forged[0, 1] = centred(int(Z[0, 0]) + 1), centred(int(Z[0, 1]) - 1)
    assert residual(s, C, forged)[0][0] == 0
    refused(Freivalds(s, backend, backend.place(W)), C, forged)


def test_large_shapes_at_their_extremes() -> None:
    n, k = 300, 70_000  # the inner dimension is cut in the product, not in the check
    w = torch.full((n, k), 127, dtype=torch.int8)
    c = torch.full((2, k), H, dtype=torch.int32)
    z = torch.full((2, n), centred(127 * H * k), dtype=torch.int32)
    s = torch.full((CHECKS, n), -H, dtype=torch.int32)
    backend = select_backend()
    check = Freivalds(s, backend, backend.place(w))
    check.check(c, z, "honest")
    z[1, n - 1] += 1
    refused(check, c, z)


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (9, 1), (2, 3)])
def test_narrow_matrices(shape: tuple[int, int]) -> None:
    w = random_codes(*shape)
    c = random_residues(3, shape[1])
    z = python_product(c, w)
    for backend in (Float64(CPU), select_backend()):
        check = verifier(w, backend)
        check.check(c, z, "honest")
        wrong = z.clone()
        wrong[0, 0] = centred(int(z[0, 0]) + 1)
        refused(check, c, wrong)


def test_s_must_fit_the_matrix() -> None:
    backend = Float64(CPU)
    with pytest.raises(ValueError, match="does not fit"):
        Freivalds(random_residues(CHECKS, N + 1), backend, backend.place(W))
    with pytest.raises(ValueError, match="does not fit"):
        Freivalds(random_residues(1, N), backend, backend.place(W))


def test_repr_hides_the_secret() -> None:
    assert repr(verifier(W)) == "Freivalds(<secret>)"


# --- S W that was computed earlier


def test_the_image_of_s() -> None:
    s = random_residues(CHECKS, N, seed=8)
    expected = [[centred(sum(a * b for a, b in zip(row, column, strict=True))) for column in W.t().tolist()] for row in s.tolist()]
    for backend in (Float64(CPU), select_backend()):
        assert image_of(s, backend, backend.place(W)).tolist() == expected
    large = torch.full((CHECKS, N), -H, dtype=torch.int32)
    codes = torch.full((N, K), -127, dtype=torch.int8)
    assert image_of(large, Float64(CPU), Float64(CPU).place(codes)).unique().tolist() == [centred(H * 127 * N)]


@given(st.integers(0, 50), st.integers(0, M - 1), st.integers(0, N - 1), st.integers(-H, H))
def test_a_stored_check_decides_like_a_fresh_one(seed: int, row: int, column: int, change: int) -> None:
    backend, s = Float64(CPU), random_residues(CHECKS, N, seed=seed)
    fresh, stored = Freivalds(s, backend, backend.place(W)), Freivalds.stored(s, image_of(s, backend, backend.place(W)))
    z = Z.clone()
    z[row, column] = centred(int(z[row, column]) + change)
    for check in (fresh, stored):
        if torch.equal(z, Z):
            check.check(C, z, "honest")
        else:
            refused(check, C, z)


def test_a_stored_image_that_is_wrong_refuses_honest_answers() -> None:
    """It errs on the safe side."""
    backend, s = Float64(CPU), random_residues(CHECKS, N)
    image = image_of(s, backend, backend.place(W))
    image[1, 2] += 1
    refused(Freivalds.stored(s, image), C, Z)
    assert repr(Freivalds.stored(s, image)) == "Freivalds(<secret>)"
