"""A worker that answers wrongly (A2): every lie is caught, and the same lie succeeds when the check is taken away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cloven.errors import VerificationFailed
from cloven.field.freivalds import Freivalds
from cloven.field.residues import H, P
from cloven.wire.channel import Channel
from cloven.wire.messages import Multiply, Product, pack, residue_frame, residues_of_frame, unpack
from tests.helpers import Context, FakeWorker, HonestExchanger, centred, offloaded, random_codes

N = K = 12
GROUPS = [random_codes(N, K, 1), random_codes(N, K, 2)]


class NoCheck(Freivalds):
    """The weakened system: accepts everything."""

    def __init__(self) -> None:
        pass

    def check(self, c: Tensor, z: Tensor, what: str) -> None:
        """Nothing."""


class Liar(HonestExchanger):
    """A worker that computes the right answer, and then says something else from the second question on."""

    def __init__(self, lie: Callable[[Liar, int, Tensor, Tensor], Tensor]) -> None:
        super().__init__(*GROUPS)
        self._lie = lie
        self.answers: list[Tensor] = []

    def answer(self, group: int, c: Tensor) -> Tensor:
        """An honest answer first, lies afterwards."""
        z = self.product(group, c)
        self.answers.append(z)
        return z if len(self.answers) == 1 else self._lie(self, group, c, z.clone())

    def multiply(
        self, layer: str, group: int, c: Tensor, columns_out: int, meanwhile: Callable[[], None], into: Tensor | None = None
    ) -> Tensor:
        """The channel's side."""
        meanwhile()
        return self.answer(group, c)


def one_element(_liar: Liar, _group: int, _c: Tensor, z: Tensor) -> Tensor:
    z[2, 5] = centred(int(z[2, 5]) + 2**20)
    return z


def smallest_change(_liar: Liar, _group: int, _c: Tensor, z: Tensor) -> Tensor:
    z[0, 0] = centred(int(z[0, 0]) - 1)
    return z


def older_answer(liar: Liar, _group: int, _c: Tensor, _z: Tensor) -> Tensor:
    return liar.answers[0]


def another_groups_product(liar: Liar, group: int, c: Tensor, _z: Tensor) -> Tensor:
    return liar.product(1 - group, c)


def another_rows_answer(_liar: Liar, _group: int, _c: Tensor, z: Tensor) -> Tensor:
    return z[[1, 0, 2]]


def one_row_for_all(_liar: Liar, _group: int, _c: Tensor, z: Tensor) -> Tensor:
    return z[:1].expand(3, N).contiguous()


def zeros(_liar: Liar, _group: int, _c: Tensor, z: Tensor) -> Tensor:
    return torch.zeros_like(z)


def scaled(_liar: Liar, _group: int, _c: Tensor, z: Tensor) -> Tensor:
    z = z.to(torch.int64) * 2 % P
    return torch.where(z > H, z - P, z).to(torch.int32)


def the_question_itself(_liar: Liar, _group: int, c: Tensor, _z: Tensor) -> Tensor:
    return c


def a_slightly_different_matrix(liar: Liar, group: int, c: Tensor, _z: Tensor) -> Tensor:
    matrix = GROUPS[group].clone()
    matrix[3, 3] ^= 1
    return HonestExchanger(matrix).product(0, c)


LIES = [
    one_element,
    smallest_change,
    older_answer,
    another_groups_product,
    another_rows_answer,
    one_row_for_all,
    zeros,
    scaled,
    the_question_itself,
    a_slightly_different_matrix,
]


def activations(seed: int) -> Tensor:
    return torch.randn(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def right(x: Tensor) -> Tensor:
    return x @ GROUPS[0].to(torch.float64).t()


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_is_caught_and_names_the_layer(lie: Callable[[Liar, int, Tensor, Tensor], Tensor]) -> None:
    matrix = offloaded(GROUPS[0], Liar(lie))
    assert torch.allclose(matrix.product(activations(0)), right(activations(0)), atol=1e-4)
    with pytest.raises(VerificationFailed, match="layer: the worker's answer is wrong"):
        matrix.product(activations(1))


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_without_the_check_the_lie_is_believed(lie: Callable[[Liar, int, Tensor, Tensor], Tensor]) -> None:
    # so that the test above can fail: nothing but the check stands between the lie and the user
    matrix = offloaded(GROUPS[0], Liar(lie), freivalds=NoCheck())
    x = activations(1)
    assert torch.allclose(matrix.product(activations(0)), right(activations(0)), atol=1e-4)
    lied = matrix.product(x)
    assert lied.shape == right(x).shape
    assert float((lied - right(x)).abs().max()) > 1e-7  # the smallest change is one unit of the field
    assert not torch.equal(lied, offloaded(GROUPS[0], HonestExchanger(*GROUPS)).product(x))


@pytest.mark.parametrize("lie", [one_element, older_answer, another_groups_product], ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("checked", [True, False])
def test_the_same_over_the_wire(context: Context, lie: Callable[[Liar, int, Tensor, Tensor], Tensor], checked: bool) -> None:
    # well-formed lies: the channel has nothing to complain about, the offload has
    liar = Liar(lie)

    def behave(frames: list[bytes]) -> list[list[bytes]]:
        request, payload = unpack(list(frames))
        assert isinstance(request, Multiply)
        assert payload is not None
        z = liar.answer(request.group, residues_of_frame(payload, request.rows, K))
        return [[pack(Product(request.id, request.rows)), bytes(residue_frame(z))]]

    channel = Channel("inproc://liar", bytes(16), timeout=5, context=context)
    with FakeWorker(context, "inproc://liar", behave):
        matrix = offloaded(GROUPS[0], channel, freivalds=None if checked else NoCheck())
        assert torch.allclose(matrix.product(activations(0)), right(activations(0)), atol=1e-4)
        if checked:
            with pytest.raises(VerificationFailed, match="layer"):
                matrix.product(activations(1))
        else:
            assert not torch.allclose(matrix.product(activations(1)), right(activations(1)), atol=1e-4)
    channel.close()
