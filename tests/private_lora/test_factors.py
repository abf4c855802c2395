from __future__ import annotations

import secrets

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.prg import KEY_BYTES
from cloven.model.adapter import LoraModule
from cloven.private_lora.config import TERMS
from cloven.private_lora.factors import Core, factor, quantise


def key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def random_module(r: int = 4, outputs: int = 30, inputs: int = 20, scale: float = 0.7, seed: int = 0) -> LoraModule:
    generator = torch.Generator().manual_seed(seed)
    return LoraModule("m", torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator), scale)


def product(module: LoraModule) -> Tensor:
    """s·B A, float64 [N, K]."""
    return module.scale * (module.b.double() @ module.a.double())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(9, 40), st.integers(1, 40), st.integers(0, 1000))
def test_the_product_stays(r: int, outputs: int, inputs: int, seed: int) -> None:
    module = random_module(r, outputs, inputs, seed=seed)
    core = factor(module, key())
    assert core.basis.shape == (outputs, r) and core.rows.shape == (r, inputs) and core.basis.dtype == torch.float32
    assert relative(core.basis.double() @ core.rows, product(module)) < 1e-6
    assert float((core.basis.double().t() @ core.basis.double() - torch.eye(r)).abs().max()) < 1e-6


def test_the_basis_spans_the_columns_of_b_only() -> None:
    module = random_module()
    v, b = factor(module, key()).basis.double(), module.b.double()
    assert relative(v @ (v.t() @ b), b) < 1e-6


def test_the_rotation_follows_from_the_key_alone() -> None:
    """All bundles of an adapter have one rotation: the norms of C's rows under several known ones would give C Cᵀ."""
    module, secret = random_module(), key()
    one, two = factor(module, secret), factor(module, secret)
    assert torch.equal(one.basis, two.basis) and torch.equal(one.rows, two.rows)
    other = factor(LoraModule("other", module.a, module.b, module.scale), secret)
    assert relative(one.basis.double(), other.basis.double()) > 0.1  # every module has its own


def test_another_key_is_another_rotation() -> None:
    """Neither basis nor rows are alike, and neither is what Gram–Schmidt makes of B."""
    module = random_module()
    one, two = factor(module, key()), factor(module, key())
    q, t = torch.linalg.qr(module.b.double())
    for a, b in ((one.basis, two.basis), (one.rows, two.rows), (one.basis, q), (one.rows, module.scale * t @ module.a.double())):
        assert relative(a.double(), b.double()) > 0.1
    overlap = one.basis.double().t() @ two.basis.double()  # O₁ O₂ᵀ: orthogonal, not diagonal
    assert float((overlap @ overlap.t() - torch.eye(4)).abs().max()) < 1e-6
    assert float((overlap - overlap.diag().diag()).abs().max()) > 0.1


def test_the_rotation_is_haar() -> None:
    """For a B whose Gram–Schmidt basis is known, V is a random orthogonal matrix: entries of variance 1/r, either sign, any order."""
    module = LoraModule("m", torch.randn(3, 8), torch.cat([torch.eye(3), torch.zeros(5, 3)]), 1.0)
    bases = torch.stack([factor(module, key()).basis[:3] for _ in range(1500)]).double()
    assert float(bases.mean(0).abs().max()) < 6 * (1 / 3 / 1500) ** 0.5
    assert float((bases.square().mean(0) - 1 / 3).abs().max()) < 6 * (0.09 / 1500) ** 0.5
    determinants = torch.linalg.det(bases)
    assert abs(float(determinants.sign().mean())) < 6 / 1500**0.5


def test_the_singular_values_do_not_show_in_the_order_of_the_rows() -> None:
    module = random_module(seed=3)
    strong = LoraModule("m", module.a * torch.tensor([[1000.0], [10.0], [0.1], [0.001]]), module.b, 1.0)
    orders = {tuple(factor(strong, key()).rows.norm(dim=1).argsort().tolist()) for _ in range(40)}
    assert len(orders) > 4


def test_a_rank_above_the_number_of_outputs() -> None:
    """B [3, 5] has three dimensions only: so have V and C, and whoever describes them must say so."""
    module = random_module(5, 3, 20)
    core = factor(module, key())
    assert core.basis.shape == (3, 3) and core.rows.shape == (3, 20)
    assert relative(core.basis.double() @ core.rows, product(module)) < 1e-6


# --- quantisation


def restored(rows: Tensor) -> Tensor:
    quantised = quantise(rows)
    codes = quantised.codes.double() * quantised.scales[:, None]
    return codes[: len(rows)] + codes[len(rows) :]


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_two_terms_restore_the_rows(count: int, columns: int, seed: int, size: float) -> None:
    rows = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    quantised = quantise(rows)
    assert quantised.codes.dtype == torch.int8 and quantised.codes.shape == (TERMS * count, columns)
    assert int(quantised.codes.min()) >= -127 and quantised.scales.dtype == torch.float64 and (quantised.scales > 0).all()
    assert float(quantised.codes.double().norm(dim=1).max()) <= quantised.l2
    errors = (restored(rows) - rows).norm(dim=1) / rows.norm(dim=1)
    assert float(errors.max()) < 2e-4 * columns**0.5


def test_about_15_bits_at_a_usual_width() -> None:
    rows = torch.randn(16, 2048, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = (restored(rows) - rows).norm(dim=1) / rows.norm(dim=1)
    assert float(errors.max()) < 2**-13
    one_term = quantise(rows)
    first = one_term.codes[:16].double() * one_term.scales[:16, None]
    assert float(((first - rows).norm(dim=1) / rows.norm(dim=1)).min()) > 2**-8  # the second term is what makes it


def test_first_terms_have_nearly_the_same_norm() -> None:
    """Whatever the rows' own norms: the scales hold them."""
    rows = torch.randn(8, 500, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 10.0 ** torch.arange(-3, 5)[:, None]
    quantised = quantise(rows)
    norms = quantised.codes[:8].double().norm(dim=1)
    assert float(norms.max() / norms.min()) < 1.01
    assert torch.allclose(quantised.scales[:8] * float(norms.mean()), rows.norm(dim=1), rtol=0.01)


def test_remainders_share_one_gain_and_are_not_longer_than_first_terms() -> None:
    rows = torch.randn(8, 500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    quantised = quantise(rows)
    gains = quantised.scales[:8] / quantised.scales[8:]
    assert float(gains.max() - gains.min()) < 1e-9 * float(gains.max()) and float(gains[0]) > 50
    norms = quantised.codes.double().norm(dim=1)
    assert float(norms[8:].max()) < 1.05 * float(norms[:8].max())


def test_rows_without_a_remainder() -> None:
    rows = torch.tensor([[127.0, 0.0, -127.0]], dtype=torch.float64)
    assert torch.allclose(restored(rows), rows, rtol=1e-12)
    assert quantise(rows).codes[0].tolist() == [127, 0, -127]


def test_an_outlier() -> None:
    rows = torch.full((2, 400), 0.01, dtype=torch.float64)
    rows[0, 7] = 100
    assert relative(restored(rows)[0], rows[0]) < 3e-3  # its small entries fall below one gain for all rows: the price of equal norms
    assert int(quantise(rows).codes.to(torch.int64).abs().max()) <= 127


@pytest.mark.parametrize("show", [factor(random_module(), key()), quantise(torch.ones(2, 3, dtype=torch.float64))], ids=["core", "codes"])
def test_no_values_in_a_repr(show: Core) -> None:
    assert "tensor" not in repr(show) and len(repr(show)) < 40


def test_the_error_and_the_bits_of_the_codes() -> None:
    rows = torch.randn(4, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain = quantise(rows)
    codes = (plain.codes.double() * plain.scales[:, None]).view(2, 4, 256).sum(0)
    assert plain.error == pytest.approx(relative(codes, rows), rel=1e-6)
    assert 5 < plain.entropy < 8
    rows[:, 0] *= 1000  # one column takes the range: the others are left with few values
    peaked = quantise(rows)
    assert peaked.error > 10 * plain.error and peaked.entropy < 3
