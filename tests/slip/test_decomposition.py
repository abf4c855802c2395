from __future__ import annotations

import math
import secrets

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.decomposition import Split, allocate_ranks, spectrum, split, truncated_svd


def stream() -> SecretStream:
    return SecretStream(secrets.token_bytes(KEY_BYTES), "test")


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decaying(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with the spectrum of a trained layer, some strong directions above a slow bulk: (W, its singular values)."""
    r = min(n, k)
    u = torch.linalg.qr(gaussian(n, r, seed)).Q
    v = torch.linalg.qr(gaussian(k, r, seed + 1)).Q
    values = 10.0 * torch.arange(1, r + 1, dtype=torch.float64) ** -0.7
    return (u * values) @ v.t(), values


SHAPES = [(40, 24), (24, 40), (32, 32), (1, 8), (8, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 12])
def test_exposed_and_secret_add_up_to_w(shape: tuple[int, int], rank: int) -> None:
    w = gaussian(*shape)
    rank = min(rank, min(shape) // 2)
    parts = split(w, rank, spectrum(w), stream())
    assert parts.secret_a.shape == (rank, shape[1]) and parts.secret_b.shape == (shape[0], rank)
    assert parts.exposed.dtype == parts.secret_a.dtype == parts.secret_b.dtype == torch.float64
    assert torch.allclose(parts.exposed + parts.secret_b @ parts.secret_a, w, rtol=0, atol=1e-12)


def test_a_bf16_matrix_is_split_as_the_numbers_that_it_holds() -> None:
    w = gaussian(64, 48).to(torch.bfloat16)
    parts = split(w, 5, spectrum(w), stream())
    assert torch.allclose(parts.exposed + parts.secret_b @ parts.secret_a, w.double(), rtol=0, atol=1e-12)


def test_rank_0_exposes_everything() -> None:
    w = gaussian(6, 4)
    assert torch.equal(split(w, 0, spectrum(w), stream()).exposed, w)


def test_the_hole_is_filled_with_values_between_those_of_the_kept_spectrum() -> None:
    w, values = decaying(60, 48)
    k = 8
    parts = split(w, k, values, stream())
    u, _, vt = torch.linalg.svd(w, full_matrices=False)
    inside = torch.linalg.svdvals(u[:, :k].t() @ parts.exposed @ vt[:k].t())  # what fills the hole
    assert bool((inside > values[-1]).all()) and bool((inside < values[k]).all())
    # A copied value would stand in the exposed spectrum twice, and the pair would point at the secret.
    assert float((inside[:, None] - values).abs().min()) > 1e-9


def test_two_splits_differ() -> None:
    w, values = decaying(30, 20)
    first, second = split(w, 4, values, stream()), split(w, 4, values, stream())
    assert not torch.allclose(first.exposed, second.exposed, atol=1e-3)


def test_repr_shows_no_values() -> None:
    w = gaussian(6, 4)
    assert repr(split(w, 2, spectrum(w), stream())) == "Split(rank=2, <secret>)"
    assert "tensor" not in f"{Split(w, w, w)}"


@pytest.mark.parametrize("shape", [*SHAPES, (300, 70)])
def test_spectrum_equals_the_singular_values(shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    assert torch.allclose(spectrum(w), torch.linalg.svdvals(w), rtol=1e-7, atol=1e-7)


def test_spectrum_of_a_large_matrix_in_float32() -> None:
    w, values = decaying(1100, 1030)
    assert torch.allclose(spectrum(w), values, rtol=2e-3, atol=0)
    assert spectrum(w).dtype == torch.float64


def test_spectrum_is_descending_and_not_negative_for_a_singular_matrix() -> None:
    values = spectrum(torch.ones(50, 40))
    assert float(values[0]) == pytest.approx(math.sqrt(2000), rel=1e-6)
    assert bool((values >= 0).all()) and bool((values.diff() <= 0).all())


@pytest.mark.parametrize("shape", [(900, 1000), (1000, 900)])
def test_the_randomised_svd_against_the_exact_one(shape: tuple[int, int]) -> None:
    """Larger than the limit of the exact SVD on both sides."""
    k = 27
    w, values = decaying(*shape)
    u, s, vt = truncated_svd(w, k, stream())
    assert u.shape == (shape[0], k) and s.shape == (k,) and vt.shape == (k, shape[1])
    assert torch.allclose(s, values[:k], rtol=1e-4, atol=0)
    identity = torch.eye(k, dtype=torch.float64)
    assert torch.allclose(u.t() @ u, identity, atol=1e-10) and torch.allclose(vt @ vt.t(), identity, atol=1e-10)
    # As good an approximation as the best one: ‖W − U_k Σ_k V_kᵀ‖² is the energy of what is left (Eckart and Young).
    left, best = w - (u * s) @ vt, values[k:].square().sum().sqrt()
    assert float(torch.linalg.vector_norm(left) / best) < 1 + 1e-4


def test_a_randomised_split_still_adds_up_to_w() -> None:
    w, values = decaying(900, 1000)
    parts = split(w, 20, values, stream())
    assert torch.allclose(parts.exposed + parts.secret_b @ parts.secret_a, w, rtol=0, atol=1e-12)


def greedy_oracle(spectra: list[list[float]], shapes: list[tuple[int, int]], fraction: float) -> list[int]:
    """One singular value at a time: the one with most energy per parameter, until the next one is too dear."""
    left = fraction * sum(n * k for n, k in shapes)
    ranks = [0] * len(shapes)
    while True:
        best, owner = -1.0, -1
        for i, (n, k) in enumerate(shapes):
            if ranks[i] < min(n, k) // 2 and spectra[i][ranks[i]] ** 2 / (n + k) > best:
                best, owner = spectra[i][ranks[i]] ** 2 / (n + k), i
        if owner < 0 or sum(shapes[owner]) > left:
            return ranks
        left -= sum(shapes[owner])
        ranks[owner] += 1


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(st.lists(sizes, min_size=1, max_size=6), st.floats(0, 0.5), st.integers(0, 2**32))
def test_ranks_against_the_obvious_way(shapes: list[tuple[int, int]], fraction: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = [torch.rand(min(shape), dtype=torch.float64, generator=generator).sort(descending=True).values for shape in shapes]
    ranks = allocate_ranks(spectra, shapes, fraction)
    assert ranks == greedy_oracle([values.tolist() for values in spectra], shapes, fraction)


@given(st.lists(sizes, min_size=1, max_size=6), st.floats(0, 0.5), st.integers(0, 2**32))
def test_ranks_stay_in_the_budget_and_leave_half(shapes: list[tuple[int, int]], fraction: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few different values: ties must not break anything.
    spectra = [torch.randint(0, 3, (min(s),), generator=generator).double().sort(descending=True).values for s in shapes]
    ranks = allocate_ranks(spectra, shapes, fraction)
    assert sum(rank * sum(shape) for rank, shape in zip(ranks, shapes, strict=True)) <= fraction * sum(n * k for n, k in shapes)
    assert all(0 <= rank <= min(shape) // 2 for rank, shape in zip(ranks, shapes, strict=True))


def test_energy_goes_first_to_where_it_is_cheapest() -> None:
    flat, steep = torch.ones(10, dtype=torch.float64), torch.tensor([9.0] * 3 + [0.1] * 7, dtype=torch.float64)
    assert allocate_ranks([flat, steep], [(10, 10), (10, 10)], 0.3) == [0, 3]  # a budget of 60 parameters, 20 per singular value
    assert allocate_ranks([flat, flat], [(10, 10), (10, 50)], 0.2) == [5, 0]  # per parameter, the small matrix's are cheaper
    assert allocate_ranks([flat, steep], [(10, 10), (10, 10)], 0) == [0, 0]
