"""The client's linears: y = W x + V v, one query per group."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cloven.errors import BadBundle, NotAttached, RunError
from cloven.private_lora.layer import AdaptedGroup, Runs, Watch, deltas
from cloven.private_lora.manifest import ClientGroup, ClientModule

K = 10
GROUP = ClientGroup(K, 300, (ClientModule("q", 12, 2), ClientModule("k", 6, 3)))


class Small(nn.Module):
    """Two linears that share an input, and one that does not."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o = nn.Linear(K, 12), nn.Linear(K, 6, bias=False), nn.Linear(18, K)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """o([q(x), k(x)])."""
        y: Tensor = self.o(torch.cat([self.q(x), self.k(x)], -1))
        return y


class Answers:
    """Computes what the server would; counts."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randn(2 * 5, K, generator=generator, dtype=torch.float64)
        self.scales = torch.rand(10, generator=generator, dtype=torch.float64) + 0.5
        self.bases = [torch.linalg.qr(torch.randn(n, r, generator=generator))[0] for n, r in ((12, 2), (6, 3))]
        self.calls: list[tuple[int, ...]] = []

    def product(self, x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        """float64 [M, 2R]."""
        assert x.dtype == torch.float64 and x.device.type == "cpu" and not x.requires_grad
        self.calls.append(tuple(x.shape))
        meanwhile()
        return x @ self.rows.t()

    def expected(self, x: Tensor) -> list[Tensor]:
        """V Σ_t scale_t·C_t x of both modules, one row at a time."""
        y = (x.double() @ self.rows.t()) * self.scales
        v = y[..., :5] + y[..., 5:]
        return [v[..., :2].float() @ self.bases[0].t(), v[..., 2:].float() @ self.bases[1].t()]


def adapted(dtype: torch.dtype = torch.float32) -> tuple[Small, AdaptedGroup, Answers]:
    model, answers = Small(dtype), Answers()
    group = AdaptedGroup(model, 0, GROUP, answers.scales, answers.bases, Runs())
    group.attach(answers.product)
    return model, group, answers


def test_every_linear_gets_its_own_part() -> None:
    model, _, answers = adapted()
    plain = Small()
    x = torch.randn(2, 3, K)
    with torch.no_grad():
        q, k = model.q(x), model.k(x)
        for output, base, delta in zip((q, k), (plain.q(x), plain.k(x)), answers.expected(x), strict=True):
            assert output.shape == base.shape and torch.allclose(output, base + delta, atol=1e-5)
            assert not torch.allclose(output, base, atol=1e-2)


def test_one_query_for_linears_that_share_an_input() -> None:
    model, _, answers = adapted()
    model(torch.randn(2, 3, K))
    assert answers.calls == [(6, K)]
    model(torch.randn(4, K))
    assert answers.calls == [(6, K), (4, K)]


def test_an_equal_input_that_is_another_tensor_is_another_query() -> None:
    model, _, answers = adapted()
    x = torch.randn(2, K)
    model.q(x)
    model.k(x.clone())
    assert len(answers.calls) == 2


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (1, 2, 3, K)])
def test_shapes(shape: tuple[int, ...]) -> None:
    model, _, answers = adapted()
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.allclose(model.q(x), Small().q(x) + answers.expected(x)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, _, answers = adapted(dtype)
    x = torch.randn(5, K).to(dtype)
    with torch.no_grad():
        y, expected = model.q(x), Small(dtype).q(x).float() + answers.expected(x)[0]
    assert y.dtype == dtype and float((y.float() - expected).norm() / expected.norm()) < 0.02


def test_strided_inputs() -> None:
    model, _, answers = adapted()
    x = torch.randn(K, 7, 3).permute(1, 2, 0)
    with torch.no_grad():
        assert torch.allclose(model.k(x), Small().k(x) + answers.expected(x)[1], atol=1e-5)


def test_the_bases_weights_and_names_stay() -> None:
    model, _, _ = adapted()
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {n: v.tolist() for n, v in Small().state_dict().items()}
    assert isinstance(model.q, nn.Linear)


def test_the_bases_own_products_run_while_the_server_answers() -> None:
    model, group, answers = adapted()
    order: list[str] = []
    plain = group._plain[0]
    group._plain[0] = lambda x: order.append("base") or plain(x)  # type: ignore[func-returns-value]

    def product(x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        order.append("sent")
        meanwhile()
        order.append("received")
        return answers.product(x, lambda: None)

    group.attach(product)
    model.q(torch.randn(1, K))
    assert order == ["sent", "base", "received"]


def test_no_gradients() -> None:
    model, _, _ = adapted()
    x = torch.randn(2, K, requires_grad=True)
    y = model.q(x)
    with pytest.raises(RunError, match="cannot be trained"):  # not a gradient that is silently wrong
        y.sum().backward()
    with torch.no_grad():
        assert not model.q(torch.randn(2, K, requires_grad=True)).requires_grad


def test_a_pass_in_which_a_group_did_not_run_is_an_error() -> None:
    """Something took the adapter off: the text would be the base's."""
    model, _, _ = adapted()
    runs = model.q.forward._group._runs
    Watch(model, ["q+k"], runs)
    model(torch.randn(1, K))
    model.q.forward = type(model.q).forward.__get__(model.q)
    model.k.forward = type(model.k).forward.__get__(model.k)
    with pytest.raises(RunError, match=r"q\+k: the adapter was not asked"):
        model(torch.randn(1, K))


def test_without_a_server() -> None:
    model, answers = Small(), Answers()
    AdaptedGroup(model, 0, GROUP, answers.scales, answers.bases, Runs())
    with pytest.raises(NotAttached, match=r"q\+k: no adapter server is attached"):
        model(torch.randn(1, K))


def test_a_failure_leaves_nothing_behind() -> None:
    model, group, answers = adapted()
    x = torch.randn(2, K)

    def fail(_: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        meanwhile()
        raise RunError("gone")

    group.attach(fail)
    with pytest.raises(RunError, match="gone"):
        model.q(x)
    group.attach(answers.product)
    with torch.no_grad():
        assert torch.allclose(model.k(x), Small().k(x) + answers.expected(x)[1], atol=1e-5)


def test_remove_gives_back_the_base() -> None:
    model, group, _ = adapted()
    group.remove()
    x = torch.randn(3, K)
    with torch.no_grad():
        assert torch.equal(model(x), Small()(x))


def test_a_copy_starts_without_a_server() -> None:
    model: Any
    model, group, answers = adapted()
    model.cloven_lora = [group]
    x = torch.randn(3, K)
    clone: Any = copy.deepcopy(model)
    with pytest.raises(NotAttached):
        clone(x)
    (other,) = clone.cloven_lora
    assert other is not group and other.modules[0] is clone.q and clone.q.forward._group is other
    with torch.no_grad():
        clone.q.weight.zero_()  # its own weights
        other.attach(answers.product)
        assert torch.allclose(clone.q(x), clone.q.bias + answers.expected(x)[0], atol=1e-5)
        assert torch.allclose(model.q(x), Small().q(x) + answers.expected(x)[0], atol=1e-5)
    other.remove()
    with torch.no_grad():
        assert torch.allclose(clone.q(x), clone.q.bias.expand(3, 12))


@pytest.mark.parametrize(
    ("name", "match"),
    [("nowhere", "has no nowhere"), ("q.weight", "has no q.weight"), ("", "no plain linear"), ("norm", "no plain linear")],
)
def test_other_models(name: str, match: str) -> None:
    model, answers = Small(), Answers()
    model.norm = nn.LayerNorm(K)
    group = ClientGroup(K, 300, (GROUP.modules[0], ClientModule(name, 6, 3)))
    with pytest.raises(BadBundle, match=match):
        AdaptedGroup(model, 0, group, answers.scales, answers.bases, Runs())


def test_adapted_once() -> None:
    model, _, answers = adapted()
    with pytest.raises(BadBundle, match="is the model adapted"):
        AdaptedGroup(model, 1, GROUP, answers.scales, answers.bases, Runs())


def test_a_group_that_fails_leaves_the_model_alone() -> None:
    model, answers = Small(), Answers()
    group = ClientGroup(K, 300, (*GROUP.modules, ClientModule("nowhere", 6, 3)))
    with pytest.raises(BadBundle):
        AdaptedGroup(model, 0, group, answers.scales, [*answers.bases, answers.bases[1]], Runs())
    x = torch.randn(3, K)
    with torch.no_grad():
        assert torch.equal(model(x), Small()(x))


def test_deltas_by_hand() -> None:
    y = torch.tensor([[1.0, 10.0, 2.0, 20.0]], dtype=torch.float64)  # two rows, two terms
    scales = torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    first, second = deltas(y, scales, [torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0]])])
    assert first.tolist() == [[2.0, 6.0]] and second.tolist() == [[20.0]]


def test_no_values_in_a_repr() -> None:
    _, group, _ = adapted()
    shown: Any = repr(group)
    assert "tensor" not in shown
