from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cloven.errors import UnsupportedModel
from cloven.model.linears import bias_of, is_linear, linears_of, matrix_of, require_supported
from cloven.zoo.tiny import FAMILIES
from tests.split_models import tiny


def test_conv1d_is_a_linear_with_its_weight_transposed() -> None:
    layer = Conv1D(5, 3)  # 3 in, 5 out
    x = torch.randn(2, 3)
    assert matrix_of(layer).shape == (5, 3)
    assert torch.allclose(x @ matrix_of(layer).t(), layer(x) - layer.bias)


def test_a_linear() -> None:
    layer = nn.Linear(3, 5, bias=False)
    assert matrix_of(layer) is layer.weight and bias_of(layer) is None
    assert bias_of(nn.Linear(3, 5)) is not None


def test_subclasses_may_compute_something_else() -> None:
    class Doubled(nn.Linear):
        pass

    assert is_linear(nn.Linear(1, 1)) and is_linear(Conv1D(1, 1))
    assert not is_linear(Doubled(1, 1)) and not is_linear(nn.Embedding(1, 1))
    with pytest.raises(UnsupportedModel, match=r"odd: layer 0 \(Doubled\.weight\) cannot be split"):
        require_supported(nn.Sequential(Doubled(2, 2)), "odd")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_supported(family: str) -> None:
    require_supported(tiny(family), family)
    assert len(linears_of(tiny(family))) in (9, 13, 15)


def test_weights_elsewhere_are_refused_by_name() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.router = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))

    with pytest.raises(UnsupportedModel, match=r"odd: layer  ?\(Bare\.router\) cannot be split"):
        require_supported(Bare(), "odd")
    with pytest.raises(UnsupportedModel, match=r"odd: layer 1 \(Conv2d\.weight\)"):
        require_supported(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 2)), "odd")


def test_experts_are_named_as_what_they_are() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(4, 2, 2))

    with pytest.raises(UnsupportedModel, match=r"odd: 0 is a mixture of experts.*not supported"):
        require_supported(nn.Sequential(Experts()), "odd")


def test_nothing_to_split() -> None:
    with pytest.raises(UnsupportedModel, match="no linear layers"):
        require_supported(nn.Embedding(2, 2), "odd")
