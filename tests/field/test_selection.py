from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cloven.errors import BadInput, ClovenError, RunError
from cloven.field import selection
from cloven.field.native.library import Kernels, load_kernels
from cloven.field.products import Float64, Int8Digits, PlacedMatrix
from cloven.field.residues import centre
from cloven.field.selection import select_backend, self_check
from tests.helpers import CPU, Saturating

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="the C++ kernels are not built")


def test_self_check_accepts_the_exact_and_rejects_the_saturating() -> None:
    assert self_check(Float64(CPU))
    assert not self_check(Saturating())


class Rounding(Float64):
    """float32 sums: the mistake of whoever wants the float path faster."""

    name = "float32"

    def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
        return centre((c.to(torch.float32) @ w.codes.to(torch.float32).t()).to(torch.int64))[None]


def test_self_check_rejects_rounding() -> None:
    assert not self_check(Rounding(CPU))


def test_self_check_covers_a_single_column() -> None:
    # torch._int_mm reads out of bounds when the inner dimension is 1: a back end that is wrong there must not be chosen
    class WrongAtOne(Float64):
        def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
            return super().parts(c, w) + (w.columns == 1)

    assert not self_check(WrongAtOne(CPU))


def test_self_check_covers_products_of_many_rows() -> None:
    """They have kernels of their own, which few rows never meet."""

    class WrongForMany(Int8Digits):
        def parts(self, c: Tensor, w: PlacedMatrix) -> Tensor:
            parts = super().parts(c, w)
            return parts if len(c) < 7 else parts + 1

    assert self_check(Int8Digits(CPU)) and not self_check(WrongForMany(CPU))


def test_selection_falls_back_and_finally_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "load_kernels", lambda: None)
    monkeypatch.setattr(selection, "_selected", {})
    monkeypatch.setattr(Int8Digits, "parts", lambda _self, c, w: Saturating().parts(c, w))
    assert select_backend().name == "float64"
    monkeypatch.setattr(selection, "_selected", {})
    monkeypatch.setattr(Float64, "parts", lambda _self, c, w: Saturating().parts(c, w))
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
from cloven.field.products import Int8Digits, digits, multiply
from cloven.field.selection import select_backend
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
        assert name.endswith("float64")


@needs_kernels
def test_the_native_kernel_is_chosen_where_it_is_built_and_left_aside_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(selection.KERNELS, raising=False)
    assert select_backend().name.startswith("native-")
    monkeypatch.setenv(selection.KERNELS, "torch")
    assert not select_backend().name.startswith("native-")


@needs_kernels
def test_a_wrong_kernel_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kernels.product
    monkeypatch.setattr(selection, "_selected", {})
    monkeypatch.setattr(Kernels, "product", lambda self, c, w, kernel=None: right(self, c, w, kernel) + (w.shape[0] == 24))
    assert not select_backend().name.startswith("native-")


def test_an_unknown_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(selection.KERNELS, "cuda")
    with pytest.raises(BadInput, match="CLOVEN_KERNELS=cuda: use native"):
        select_backend()
