"""Fact 2 of the design: a pad is used once. What reuse gives away, and that the library does not let it happen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cloven.errors import PadMisuse
from cloven.field.codec import encode, row_bounds
from cloven.field.prg import pad_residues
from cloven.field.residues import add, centre, subtract
from tests.helpers import pads_of, random_codes

K = 64
W = random_codes(8, K)


def activations(seed: int) -> Tensor:
    return torch.randn(1, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recovered_difference(c1: Tensor, c2: Tensor) -> Tensor:
    """The worker's attack on two masked rows: subtract them."""
    return subtract(c1, c2)


def test_a_pad_used_twice_gives_the_difference_exactly() -> None:
    # the weakened system: two rows under pad 0, built by hand because the library refuses
    mask = pad_residues(bytes(32), 0, 0, 1, K)
    (x1, alpha1), (x2, alpha2) = (encode(activations(seed), row_bounds(W)) for seed in (1, 2))
    difference = recovered_difference(add(x1, mask), add(x2, mask))
    assert torch.equal(difference, subtract(x1, x2))
    # α is nearly the same for rows of nearly the same norm: the worker reads x1 − x2 up to a scale
    true = activations(1) - activations(2)
    cosine = torch.nn.functional.cosine_similarity(difference.to(torch.float64) / float((alpha1 + alpha2) / 2), true)
    assert float(cosine) > 0.95


def test_the_same_row_twice_under_one_pad_is_seen_at_once() -> None:
    mask = pad_residues(bytes(32), 0, 0, 1, K)
    x, _ = encode(activations(1), row_bounds(W))
    assert not recovered_difference(add(x, mask), add(x, mask)).any()


def test_from_fresh_pads_the_difference_is_noise() -> None:
    source = pads_of(W)
    (x1, _), (x2, _) = (encode(activations(seed), row_bounds(W)) for seed in (1, 2))
    difference = recovered_difference(source.take(1).mask(x1), source.take(1).mask(x2))
    cosine = torch.nn.functional.cosine_similarity(difference.to(torch.float64), (x1 - x2).to(torch.float64))
    assert abs(float(cosine)) < 0.6  # 64 entries: a standard deviation is 0.125
    assert int((difference == subtract(x1, x2)).sum()) < 3


def test_the_library_refuses_to_reuse_one() -> None:
    pads = pads_of(W).take(1)
    (x1, _), (x2, _) = (encode(activations(seed), row_bounds(W)) for seed in (1, 2))
    pads.mask(x1)
    with pytest.raises(PadMisuse):
        pads.mask(x2)


def test_the_library_refuses_two_rows_for_one_pad() -> None:
    # the same attack through broadcasting: [2, K] + [1, K] would put both rows under the one mask
    pads = pads_of(W).take(1)
    x, _ = encode(torch.cat([activations(1), activations(2)]), row_bounds(W))
    with pytest.raises((PadMisuse, ValueError)):
        c = pads.mask(x)
        assert not torch.equal(recovered_difference(c[0], c[1]), subtract(x[0], x[1])), "the attack succeeds"


def test_a_low_dimensional_basis_of_masks_is_broken() -> None:
    # the tempting shortcut: combine a few precomputed masks, so that images come for free. d + 1 rows then are linearly dependent.
    basis = pad_residues(bytes(32), 0, 0, 4, K).to(torch.int64)
    coefficients = torch.randint(1, 1000, (5, 4), generator=torch.Generator().manual_seed(3))
    rows = [encode(activations(seed), row_bounds(W))[0][0] for seed in range(5)]
    c = torch.stack([centre(x + centre(a @ basis)) for x, a in zip(rows, coefficients, strict=True)]).to(torch.int64)
    # an integer vector n with n·coefficients = 0 cancels every mask
    minors = [torch.linalg.det(torch.cat([coefficients[:i], coefficients[i + 1 :]]).to(torch.float64)).round() for i in range(5)]
    null = [int((-1) ** i * minor) for i, minor in enumerate(minors)]
    assert all(sum(n * int(a) for n, a in zip(null, column, strict=True)) == 0 for column in coefficients.t())
    for j in range(K):
        masked = sum(n * int(row[j]) for n, row in zip(null, c, strict=True)) % (2**31 - 1)
        plain = sum(n * int(row[j]) for n, row in zip(null, rows, strict=True)) % (2**31 - 1)
        assert masked == plain  # an exact equation about the plaintext, without any mask
