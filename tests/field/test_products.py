from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.errors import ClovenError, RunError
from cloven.field import products
from cloven.field.products import MAX_INNER, Backend, Float64, Int8Digits, digits, multiply, select_backend, self_check
from cloven.field.residues import H
from tests.helpers import CPU, Saturating, int8_digits_is_exact, python_product, random_codes, random_residues

BACKENDS = [
    pytest.param(Int8Digits(CPU), marks=pytest.mark.skipif(not int8_digits_is_exact(), reason="no VNNI here: _int_mm saturates")),
    pytest.param(Float64(CPU)),
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


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 31, 32, 33, 64, 100, 1000, 4096, 16384])
def test_random_and_extreme_against_python_integers(backend: Backend, k: int) -> None:
    for m, n in [(1, 1), (1, 3), (3, 1), (2, 5)]:
        assert_exact(backend, random_residues(m, k, k), random_codes(n, k, k + 1))
    c = torch.cat(extreme_residues(1, k))
    for w in extreme_codes(1, k):
        assert_exact(backend, c, torch.cat([w, -w, random_codes(1, k)]))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_value_against_python_integers(backend: Backend, data: st.DataObject) -> None:
    m, n, k = (data.draw(st.integers(1, 9), label=name) for name in "mnk")
    residue = st.integers(-H, H) | st.sampled_from([H, -H, 0, THREE_LOW_DIGITS, 128, -128, 2**23, -(2**23)])
    code = st.integers(-127, 127) | st.sampled_from([127, -127, 0])
    c = data.draw(st.lists(st.lists(residue, min_size=k, max_size=k), min_size=m, max_size=m))
    w = data.draw(st.lists(st.lists(code, min_size=k, max_size=k), min_size=n, max_size=n))
    assert_exact(backend, torch.tensor(c, dtype=torch.int32), torch.tensor(w, dtype=torch.int8))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_inner_dimension_beyond_one_cut(backend: Backend) -> None:
    k = MAX_INNER + 4097
    c = torch.cat([torch.full((1, k), H, dtype=torch.int32), random_residues(1, k)])
    assert_exact(backend, c, torch.cat([torch.full((1, k), 127, dtype=torch.int8), random_codes(1, k)]))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_the_longest_uncut_inner_dimension_at_its_extremes(backend: Backend) -> None:
    for c in (torch.full((1, MAX_INNER), H, dtype=torch.int32), torch.full((1, MAX_INNER), THREE_LOW_DIGITS, dtype=torch.int32)):
        assert_exact(backend, c, torch.full((2, MAX_INNER), 127, dtype=torch.int8))
        assert_exact(backend, c, torch.full((2, MAX_INNER), -127, dtype=torch.int8))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_views_of_a_matrix(backend: Backend) -> None:
    w = random_codes(20, 70)
    for view in (w[:, 20:53], w[3:9], w.t(), w[:, 20:21], w[::2, ::3]):
        assert_exact(backend, random_residues(5, view.shape[1]), view)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
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
    planes = digits(torch.tensor([values], dtype=torch.int32)).to(torch.int64)  # [4, K]
    assert planes.shape == (4, len(values))
    assert int(planes[3].abs().max()) <= 64
    assert sum(planes[i] * 256**i for i in range(4)).tolist() == values  # type: ignore[union-attr]


def test_self_check_accepts_the_exact_and_rejects_the_saturating() -> None:
    assert self_check(Float64(CPU))
    assert not self_check(Saturating())


class Rounding(Float64):
    """float32 sums: the mistake of whoever wants the float path faster."""

    name = "float32"

    def block(self, c: Tensor, w: products.PlacedMatrix) -> Tensor:
        return (c.to(torch.float32) @ w.codes.to(torch.float32).t()).to(torch.int64)


def test_self_check_rejects_rounding() -> None:
    assert not self_check(Rounding(CPU))


def test_self_check_covers_a_single_column() -> None:
    # torch._int_mm reads out of bounds when the inner dimension is 1: a back end that is wrong there must not be chosen
    class WrongAtOne(Float64):
        def block(self, c: Tensor, w: products.PlacedMatrix) -> Tensor:
            return super().block(c, w) + (w.columns == 1)

    assert not self_check(WrongAtOne(CPU))


def test_selection_falls_back_and_finally_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_selected", {})
    monkeypatch.setattr(Int8Digits, "block", lambda _self, c, w: Saturating().block(c, w))
    assert select_backend().name == "float64"
    monkeypatch.setattr(products, "_selected", {})
    monkeypatch.setattr(Float64, "block", lambda _self, c, w: Saturating().block(c, w))
    with pytest.raises(RunError, match="no exact product"):
        select_backend()


def test_selection_is_made_once() -> None:
    assert select_backend("cpu") is select_backend(torch.device("cpu"))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", ""])
def test_no_such_device(device: str) -> None:
    with pytest.raises(ClovenError):
        select_backend(device)


_OTHER_CPU = """
import torch
from cloven.field.products import Int8Digits, digits, multiply, select_backend
from tests.helpers import python_product, random_codes, random_residues
from tests.field.test_products import extreme_codes, extreme_residues

backend = select_backend()
plain = Int8Digits(torch.device("cpu"))
int_mm_is_exact = True
for m, n, k in [(1, 1, 64), (1, 40, 256), (4, 9, 1000), (5, 24, 4096)]:
    cases = [(random_residues(m, k), random_codes(n, k))]
    cases += [(c, w) for c in extreme_residues(m, k) for w in extreme_codes(n, k)] if m * n * k < 20000 else []
    for c, w in cases:
        expected = python_product(c, w)
        assert torch.equal(multiply(backend, c, backend.place(w)), expected), (backend.name, m, n, k)
        int_mm_is_exact &= torch.equal(multiply(plain, c, plain.place(w)), expected)
print(backend.name, int_mm_is_exact)
"""


@pytest.mark.parametrize(
    "isa", ["AVX2", pytest.param("SSE41", marks=pytest.mark.long), pytest.param("AVX512_CORE", marks=pytest.mark.long)]
)
def test_a_cpu_without_vnni_gets_an_exact_back_end(isa: str, pytestconfig: pytest.Config) -> None:
    # oneDNN reads this variable once, at its first product, so it needs a process of its own
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    result = subprocess.run(
        [sys.executable, "-c", _OTHER_CPU], env=environment, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    name, int_mm_is_exact = result.stdout.split()
    if int_mm_is_exact == "False":
        assert name == "float64"
