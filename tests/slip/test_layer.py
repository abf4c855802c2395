from __future__ import annotations

import copy
import secrets
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cloven.errors import NotAttached
from cloven.field.prg import KEY_BYTES, SecretStream
from cloven.slip.decomposition import spectrum, split
from cloven.slip.exposed_matrix import ExposedMatrix, expose
from cloven.slip.layer import Product, SplitGroup, SplitLinear
from cloven.slip.mixing import Mixing

COLUMNS = 24


class Layers(nn.Module):
    """A group of linears split by hand, beside the originals: the smallest thing that a session can be attached to."""

    def __init__(self, terms: int = 1, biases: tuple[bool, ...] = (True, False), rank: int = 3, mixed: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        stream = SecretStream(secrets.token_bytes(KEY_BYTES), "test")
        self.weights = [torch.randn(10 + i, COLUMNS, dtype=torch.float64, generator=generator) for i in range(len(biases))]
        self.biases = [torch.randn(10 + i, generator=generator) if bias else None for i, bias in enumerate(biases)]
        parts = [split(w, rank, spectrum(w), stream) for w in self.weights]
        self.exposed: ExposedMatrix = expose(torch.cat([part.exposed for part in parts]), terms, stream, mixed=mixed)
        self.linears = nn.ModuleList()
        start = 0
        for i, (part, bias) in enumerate(zip(parts, self.biases, strict=True)):
            rows = part.exposed.shape[0]
            linear = SplitLinear(
                f"block.{'abc'[i]}", rows, COLUMNS, rank, terms, bias is not None, 2 * mixed, 0 if i else len(self.exposed.row_scale[0])
            )
            linear.secret_a.data, linear.secret_b.data = part.secret_a.float(), part.secret_b.float()
            linear.row_gather.data = self.exposed.row_gather[:, start : start + rows]
            linear.row_scale.data = self.exposed.row_scale[:, start : start + rows]
            if i == 0:
                for name in ("column_gather", "column_scale", "mixing_gather", "mixing_scale"):
                    getattr(linear, name).data = getattr(self.exposed, name)
            if linear.bias is not None and bias is not None:
                linear.bias.data = bias
            self.linears.append(linear)
            start += rows
        self.group = SplitGroup(0, self.members())

    def members(self) -> list[SplitLinear]:
        return [linear for linear in self.linears if isinstance(linear, SplitLinear)]

    def exact_product(self) -> Product:
        """What a worker and an exact channel compute, in float64."""
        codes = self.exposed.codes.double()

        def product(x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
            self.seen = x
            meanwhile()
            return x @ codes.t()

        return product

    def oracle(self, i: int, x: Tensor) -> Tensor:
        """What the split layer should compute: the quantised exposed part and the exact secret one."""
        start = sum(w.shape[0] for w in self.weights[:i])
        member, rows = self.members()[i], self.weights[i].shape[0]
        w = self.exposed.dequantised()[start : start + rows] + member.secret_b.double() @ member.secret_a.double()
        bias = self.biases[i]
        y: Tensor = x.double() @ w.t() + (bias.double() if bias is not None else 0)
        return y


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 70), ()])
def test_every_member_against_float64(terms: int, shape: tuple[int, ...], mixed: bool) -> None:
    layers = Layers(terms, mixed=mixed)
    layers.group.attach(layers.exact_product())
    x = inputs(*shape)
    for i, member in enumerate(layers.members()):
        y = member(x)
        assert y.shape == (*shape, member.out_features) and y.dtype == torch.float32
        assert torch.allclose(y.double(), layers.oracle(i, x), rtol=1e-5, atol=1e-5)
        tolerance = 0.2 if terms == 1 else 1e-3  # the quantisation: 24 columns of 1/127 steps, and of 1/32258
        assert torch.allclose(
            layers.oracle(i, x), (x.double() @ layers.weights[i].t()) + (layers.biases[i] if i == 0 else 0), atol=tolerance
        )


def test_siblings_share_one_product_and_the_worker_sees_a_scrambled_x() -> None:
    layers = Layers()
    calls = []
    exact = layers.exact_product()
    layers.group.attach(lambda x, meanwhile: (calls.append(1), exact(x, meanwhile))[1])
    x = inputs(2)
    for member in layers.members():
        member(x)
    assert len(calls) == 1
    gather, scale = layers.exposed.column_gather, layers.exposed.column_scale
    expected = x.double()[:, gather[0].long()] * scale[0].double()
    assert torch.equal(layers.seen, torch.from_numpy(Mixing(gather[1:], scale[1:]).apply(expected.numpy())))


def test_bf16_comes_back_as_bf16_rounded_once() -> None:
    layers = Layers(2)
    layers.group.attach(layers.exact_product())
    x = inputs(4).to(torch.bfloat16)
    y = layers.members()[0](x)
    assert y.dtype == torch.bfloat16
    exact = layers.oracle(0, x)
    assert bool(((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all())


def test_outputs_are_as_dense_as_those_of_a_linear() -> None:
    layers = Layers(biases=(False, False, False))
    layers.group.attach(layers.exact_product())
    x = torch.randn(2, 3, COLUMNS)
    for linear in layers.members():
        y = linear(x)
        assert y.is_contiguous() and y.untyped_storage().nbytes() == y.nbytes
        y.view(-1)


def test_rank_0() -> None:
    layers = Layers(rank=0)
    layers.group.attach(layers.exact_product())
    x = inputs(3)
    assert torch.allclose(layers.members()[1](x).double(), layers.oracle(1, x), atol=1e-5)


def test_a_call_without_a_worker_says_what_to_do() -> None:
    layers = Layers()
    with pytest.raises(NotAttached, match=r"block\.\{a,b\}: no worker is attached.*cloven\.attach\(model, ADDRESS\)"):
        layers.members()[1](inputs(1))
    layers.group.attach(layers.exact_product())
    layers.members()[0](inputs(1))


def test_a_member_of_no_group() -> None:
    with pytest.raises(NotAttached, match="alone is not part of a loaded split model"):
        SplitLinear("alone", 2, COLUMNS, 1, 1, False, 2, 2)(inputs(1))


def test_the_model_in_bf16_keeps_float32_factors() -> None:
    layers = Layers(2)
    before = {name: parameter.clone() for name, parameter in layers.linears.named_parameters()}
    layers.to(torch.bfloat16)
    for name, parameter in layers.linears.named_parameters():
        kind = name.rpartition(".")[2]
        if kind in ("weight", "bias"):
            assert parameter.dtype == torch.bfloat16
        else:
            assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name
    layers.group.attach(layers.exact_product())
    x = inputs(2).to(torch.bfloat16)
    assert torch.allclose(layers.members()[1](x).double(), layers.oracle(1, x), rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_model_that_is_cast_after_it_was_attached(rows: int) -> None:
    """One row is the kernel's work, several are PyTorch's: both see the factors and biases as they are."""
    layers = Layers()
    layers.group.attach(layers.exact_product())
    for dtype in (torch.bfloat16, torch.float32):
        layers.to(dtype)
        x, total = inputs(rows), torch.empty(rows, sum(len(w) for w in layers.weights))
        layers.group.secret_part(x, total)
        parts = [x @ m.secret_a.t() @ m.secret_b.t() + (m.bias if m.bias is not None else 0.0) for m in layers.members()]
        assert torch.allclose(total, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_secret_part_is_float32_under_autocast(rows: int) -> None:
    layers = Layers()
    layers.group.attach(layers.exact_product())
    x = inputs(rows)
    with torch.autocast("cpu", torch.bfloat16):
        y = layers.members()[0](x)
    assert torch.allclose(y.double(), layers.oracle(0, x), atol=1e-5)


def test_a_deep_copy_has_its_own_group_and_no_session() -> None:
    layers = Layers()
    layers.group.attach(layers.exact_product())
    clone = copy.deepcopy(layers.linears)
    copied = [linear for linear in clone if isinstance(linear, SplitLinear)]
    assert copied[0].group is copied[1].group is not layers.group
    assert copied[0].group is not None and copied[0].group.members == copied
    with pytest.raises(NotAttached):
        copied[0](inputs(1))
    x = inputs(2)
    copied[0].group.attach(layers.exact_product())
    assert torch.equal(copied[1](x), layers.members()[1](x))
    with torch.no_grad():
        copied[1].secret_b.zero_()
    assert float(layers.members()[1].secret_b.abs().max()) > 0


def test_a_deep_copy_of_one_member_takes_its_siblings_along() -> None:
    layers = Layers()
    clone = copy.deepcopy(layers.members()[1])
    assert clone.group is not None and clone.group.members[1] is clone
    clone.group.attach(layers.exact_product())
    layers.group.attach(layers.exact_product())
    assert torch.equal(clone(inputs(2)), layers.members()[1](inputs(2)))


def test_repr_shows_shapes_and_no_values() -> None:
    text = repr(Layers().linears)
    assert "in_features=24, out_features=10, rank=3" in text
    assert "tensor" not in text and "Parameter" not in text


def test_nothing_can_be_trained() -> None:
    assert not any(parameter.requires_grad for parameter in Layers().linears.parameters())


def test_names_of_groups() -> None:
    def name(*names: str) -> str:
        members = [SplitLinear(one, 2, 2, 0, 1, False, 0, 0 if i else 4) for i, one in enumerate(names)]
        return SplitGroup(0, members).name

    assert name("lm_head") == "lm_head"
    assert name("layers.0.q_proj", "layers.0.k_proj") == "layers.0.{q_proj,k_proj}"
    assert name("layers.0.attention.query", "layers.0.mlp.up") == "layers.0.attention.query+layers.0.mlp.up"
