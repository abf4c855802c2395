"""One row times the factors of several linears: against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cloven.field.native.library import Kernels, load_kernels
from cloven.field.native.low_rank import LowRank

BIASES = (None, torch.float32, torch.bfloat16)
Member = tuple[Tensor, Tensor, Tensor | None]


def kernels() -> Kernels:
    found = load_kernels()
    assert found is not None
    return found


pytestmark = pytest.mark.skipif(load_kernels() is None or kernels().low_rank(None, 0, None, 1, 0, None) != 0, reason="no AVX-512")


def member(rows: int, columns: int, rank: int, bias: torch.dtype | None, seed: int) -> Member:
    random = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, generator=random).to(bias) if bias is not None else None
    return torch.randn(rank, columns, generator=random), torch.randn(rows, rank, generator=random), b


def exactly(members: list[Member], x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs in float64, and what bounds their rounding: the same with all signs alike."""
    parts, sizes = [], []
    for a, b, bias in members:
        shift = torch.zeros(len(b)) if bias is None else bias
        parts.append(x.double() @ a.double().t() @ b.double().t() + shift.double())
        sizes.append(x.double().abs() @ a.double().abs().t() @ b.double().abs().t() + shift.double().abs())
    return torch.cat(parts, 1), torch.cat(sizes, 1)


@settings(max_examples=80, deadline=None)
@given(
    columns=st.integers(1, 300),
    sizes=st.lists(
        st.tuples(st.integers(1, 70), st.integers(0, 40), st.sampled_from([None, torch.float32, torch.bfloat16])), min_size=1, max_size=3
    ),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_in_float64(columns: int, sizes: list[tuple[int, int, torch.dtype | None]], half: bool, seed: int) -> None:
    members = [member(rows, columns, rank, bias, seed + i) for i, (rows, rank, bias) in enumerate(sizes)]
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16 if half else torch.float32)
    low_rank = LowRank.of(kernels(), members)
    assert low_rank is not None
    around = torch.full((1, low_rank.rows + 2), 7.0)
    low_rank.onto(x, around[:, 1:-1].view(1, -1))
    found, (expected, size) = around[:, 1:-1].double(), exactly(members, x)
    assert bool(((found - expected).abs() <= 1e-6 * (8 + columns**0.5) * size + 1e-30).all())
    assert around[0, 0] == around[0, -1] == 7.0


def test_a_parameter_whose_tensor_is_replaced_stays_as_it_was() -> None:
    a, b, bias = member(500, 400, 30, torch.bfloat16, 1)
    assert bias is not None
    parameters = tuple(nn.Parameter(tensor.clone(), requires_grad=False) for tensor in (a, b, bias))
    low_rank, x, out = LowRank(kernels(), [parameters]), torch.ones(1, 400), torch.zeros(1, 500)
    for parameter in parameters:
        parameter.data = torch.zeros(7)  # as `model.to` does
    rubbish = [torch.full_like(tensor, 9.0) for tensor in (a, b, bias)]  # takes the place of what is freed
    low_rank.onto(x, out)
    assert torch.allclose(out, x @ a.t() @ b.t() + bias, rtol=1e-4, atol=1e-2) and len(rubbish) == 3


def test_numbers_that_are_not_finite_stay_so() -> None:
    low_rank = LowRank(kernels(), [member(5, 40, 3, None, 1)])
    x, out = torch.ones(1, 40), torch.zeros(1, 5)
    x[0, 39] = torch.nan
    low_rank.onto(x, out)
    assert bool(out.isnan().all())


def test_what_does_not_fit_is_refused_before_c_sees_it() -> None:
    a, b, bias = member(5, 40, 3, torch.float32, 1)
    askew = b.t().contiguous().t()
    for wrong in ((a[:2], b, bias), (a.double(), b, bias), (a, askew, bias), (a, b, torch.zeros(4)), (a, b, torch.zeros(10)[::2])):
        with pytest.raises(ValueError, match="factors are dense"):
            LowRank(kernels(), [wrong])
    for left in ((a, askew, bias), (a, b, torch.zeros(5, dtype=torch.float16))):  # to PyTorch
        assert LowRank.of(kernels(), [left]) is None
    low_rank, x, out = LowRank(kernels(), [(a, b, bias)]), torch.zeros(1, 40), torch.zeros(1, 5)
    for wrong_x, wrong_out in (
        (x[:, :39], out), (x.double(), out), (x, out[:, :4]), (x, out.bfloat16()), (torch.zeros(2, 40), torch.zeros(2, 5)),
        (torch.zeros(1, 80)[:, ::2], out), (x, torch.zeros(1, 10)[:, ::2]), (x[0], out[0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="does not fit"):
            low_rank.onto(wrong_x, wrong_out)
    assert "secret" in repr(low_rank) and "tensor" not in repr(low_rank)
