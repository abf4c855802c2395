from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.field.products import MAX_INNER, Backend, Float64, Int8Digits, digits, multiply
from cloven.field.residues import H
from tests.helpers import CPU, int8_digits_is_exact, native_backend, python_product, random_codes, random_residues

BACKENDS = [
    pytest.param(Int8Digits(CPU), marks=pytest.mark.skipif(not int8_digits_is_exact(), reason="no VNNI here: _int_mm saturates")),
    pytest.param(Float64(CPU)),
    pytest.param(native_backend(), marks=pytest.mark.skipif(native_backend() is None, reason="the C++ kernels are not built"), id="native"),
]
THREE_LOW_DIGITS = -(128 + 128 * 256 + 128 * 65536)  # digits −128, −128, −128, 0


def extreme_residues(m: int, k: int) -> list[Tensor]:
    even = torch.arange(k) % 2 == 0
    rows = [
        torch.full((k,), H),
        torch.full((k,), -H),
        torch.where(even, H, -H),
        torch.full((k,), THREE_LOW_DIGITS),
        torch.where(even, THREE_LOW_DIGITS, 127 + 127 * 256 + 127 * 65536),
        torch.zeros(k, dtype=torch.int64),
        torch.where(torch.arange(k) == k // 2, H, 3),  # one outlier
    ]
    return [row.to(torch.int32).expand(m, k).contiguous() for row in rows]


def extreme_codes(n: int, k: int) -> list[Tensor]:
    even = torch.arange(k) % 2 == 0
    rows = [torch.full((k,), 127), torch.full((k,), -127), torch.where(even, 127, -127), torch.zeros(k, dtype=torch.int64)]
    return [row.to(torch.int8).expand(n, k).contiguous() for row in rows]


def assert_exact(backend: Backend, c: Tensor, w: Tensor) -> None:
    z = multiply(backend, c, backend.place(w))
    assert z.dtype == torch.int32
    assert z.shape == (c.shape[0], w.shape[0])
    assert torch.equal(z.cpu(), python_product(c, w))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 31, 32, 33, 64, 100, 1000, 4096, 16384])
def test_random_and_extreme_against_python_integers(backend: Backend, k: int) -> None:
    for m, n in [(1, 1), (1, 3), (3, 1), (2, 5)]:
        assert_exact(backend, random_residues(m, k, k), random_codes(n, k, k + 1))
    c = torch.cat(extreme_residues(1, k))
    for w in extreme_codes(1, k):
        assert_exact(backend, c, torch.cat([w, -w, random_codes(1, k)]))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_value_against_python_integers(backend: Backend, data: st.DataObject) -> None:
    m, n, k = (data.draw(st.integers(1, 9), label=name) for name in "mnk")
    residue = st.integers(-H, H) | st.sampled_from([H, -H, 0, THREE_LOW_DIGITS, 128, -128, 2**23, -(2**23)])
    code = st.integers(-127, 127) | st.sampled_from([127, -127, 0])
    c = data.draw(st.lists(st.lists(residue, min_size=k, max_size=k), min_size=m, max_size=m))
    w = data.draw(st.lists(st.lists(code, min_size=k, max_size=k), min_size=n, max_size=n))
    assert_exact(backend, torch.tensor(c, dtype=torch.int32), torch.tensor(w, dtype=torch.int8))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
def test_inner_dimension_beyond_one_cut(backend: Backend) -> None:
    k = MAX_INNER + 4097
    c = torch.cat([torch.full((1, k), H, dtype=torch.int32), random_residues(1, k)])
    assert_exact(backend, c, torch.cat([torch.full((1, k), 127, dtype=torch.int8), random_codes(1, k)]))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
def test_the_longest_uncut_inner_dimension_at_its_extremes(backend: Backend) -> None:
    for c in (torch.full((1, MAX_INNER), H, dtype=torch.int32), torch.full((1, MAX_INNER), THREE_LOW_DIGITS, dtype=torch.int32)):
        assert_exact(backend, c, torch.full((2, MAX_INNER), 127, dtype=torch.int8))
        assert_exact(backend, c, torch.full((2, MAX_INNER), -127, dtype=torch.int8))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
def test_views_of_a_matrix(backend: Backend) -> None:
    w = random_codes(20, 70)
    for view in (w[:, 20:53], w[3:9], w.t(), w[:, 20:21], w[::2, ::3], w[:, :1].t(), w[:1, :2].t().contiguous().t()):
        assert_exact(backend, random_residues(5, view.shape[1]), view)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
def test_no_rows(backend: Backend) -> None:
    assert multiply(backend, random_residues(0, 16), backend.place(random_codes(8, 16))).shape == (0, 8)


@pytest.mark.skipif(not int8_digits_is_exact(), reason="no VNNI here: _int_mm saturates")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1000, 512), (17, 33, 4096), (257, 64, 100), (600, 7, 31), (4, 512, 16384)])
def test_back_ends_agree(m: int, n: int, k: int) -> None:
    for c in (random_residues(m, k), extreme_residues(m, k)[2]):
        w = random_codes(n, k)
        a, b = (multiply(backend, c, backend.place(w)) for backend in (Int8Digits(CPU), Float64(CPU)))
        assert torch.equal(a, b)


@given(st.lists(st.integers(-H, H), min_size=1, max_size=12))
def test_digits_are_balanced_and_exact(values: list[int]) -> None:
    planes = digits(torch.tensor([values], dtype=torch.int32))[0].t().to(torch.int64)  # [4, K]
    assert planes.shape == (4, len(values))
    assert int(planes[3].abs().max()) <= 64
    assert sum(planes[i] * 256**i for i in range(4)).tolist() == values  # type: ignore[union-attr]


# --- small: int8 times int8


def exact_small(a: Tensor, w: Tensor) -> Tensor:
    return a.to(torch.int64) @ w.to(torch.int64).t()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
@pytest.mark.parametrize("k", [1, 2, 3, 31, 33, 1280])
def test_small_products_of_every_shape(backend: Backend, k: int) -> None:
    for m, n in [(1, 1), (1, 7), (7, 1), (64, 5), (65, 5), (200, 3)]:
        a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=torch.Generator().manual_seed(m))
        w = random_codes(n, k, n)
        product = backend.small(a, backend.place(w))
        assert product.dtype == torch.int32 and product.shape == (m, n)
        assert torch.equal(product.to(torch.int64), exact_small(a, w))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_small_products_at_their_extremes(backend: Backend, rows: int) -> None:
    """The digits of residues reach −128, on either side of the product."""
    for k in (1, 2, 1280, MAX_INNER):
        for left, right in ((-128, 127), (127, -128), (-128, -127), (-127, -128), (127, 127)):
            a, w = torch.full((rows, k), left, dtype=torch.int8), torch.full((2, k), right, dtype=torch.int8)
            product = backend.small(a, backend.place(w))
            assert (product == left * right * k).all(), (k, left, right)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
def test_small_products_of_views_and_of_nothing(backend: Backend) -> None:
    wide = torch.randint(-128, 128, (90, 60), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    for a in (wide[:, 7:40], wide[::3, :33], wide.t()[:, :33], wide[:1, 7:40]):
        for w in (random_codes(6, 70)[:, 20:53], random_codes(33, 6).t(), random_codes(1, 70)[:, 3:36]):
            assert torch.equal(backend.small(a, backend.place(w)).to(torch.int64), exact_small(a, w))
    assert backend.small(wide[:0, :33], backend.place(random_codes(6, 33))).shape == (0, 6)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: getattr(b, "name", "native"))
@given(data=st.data())
def test_any_small_product(backend: Backend, data: st.DataObject) -> None:
    m, n, k = (data.draw(st.integers(1, 9), label=name) for name in "mnk")
    entry = st.integers(-128, 127) | st.sampled_from([-128, 127])
    a, w = (
        torch.tensor(data.draw(st.lists(st.lists(entry, min_size=k, max_size=k), min_size=rows, max_size=rows)), dtype=torch.int8)
        for rows in (m, n)
    )
    assert torch.equal(backend.small(a, backend.place(w)).to(torch.int64), exact_small(a, w))
