"""One query, against a server in this process that computes by Python integers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloven.errors import WorkerRefused
from cloven.field.native.library import KERNELS
from cloven.field.products import Float64, multiply
from cloven.field.residues import is_residue
from cloven.masks.lwe_parameters import lwe_parameters
from cloven.private_lora import query as module
from cloven.private_lora.manifest import ClientGroup, ClientModule
from cloven.private_lora.messages import Answer, Query, rounded
from cloven.private_lora.query import CheckFailed, RemoteMatrix
from cloven.private_lora.session import remote_matrix
from cloven.wire.schema import ErrorAnswer, MalformedMessage
from tests.helpers import CPU, random_codes
from tests.masks.test_lwe import prepared

BUNDLE = bytes(16)
K, RANK = 30, 2
HINTS = ("lwe", "statistical")


@pytest.fixture(params=["native", "torch"], autouse=True)
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In C++ where it was compiled, and without it."""
    monkeypatch.setenv(KERNELS, request.param)


class HonestChannel:
    """A channel to a server in this process; records what it sees. `twist` changes the answers."""

    bundle = BUNDLE

    def __init__(self, matrix: Tensor, bits: int) -> None:
        self.matrix, self.bits = matrix, bits
        self.seen: list[tuple[Query, Tensor]] = []
        self.order: list[str] = []
        self.twist: Callable[[Any, bytes], tuple[Any, bytes]] = lambda message, payload: (message, payload)

    def rows(
        self, name: str, group: int, c: Tensor, kinds: tuple[Any, Any], out: Tensor, meanwhile: Callable[[], None]
    ) -> memoryview | None:
        """What the real one does, without a wire."""
        assert name == "m" and group == 3 and kinds == (Query, Answer)
        rows, request = c.shape[0], Query(len(self.seen) + 1, BUNDLE, group, c.shape[0])
        self.seen.append((request, c.clone()))
        self.order.append("sent")
        meanwhile()
        backend = Float64(CPU)
        q = bytes(rounded(multiply(backend, c, backend.place(self.matrix)), self.bits))
        assert out.nbytes == len(q)
        message, answer = self.twist(Answer(request.id, request.rows), q)
        if not isinstance(message, Answer) or message.rows != rows:
            raise WorkerRefused("something else")
        return memoryview(answer)

    def parsed(self, name: str, parse: Callable[[], Tensor]) -> Tensor:
        """What the real one makes of an answer, with its own kind of error."""
        assert name == "m"
        return parse()


def remote(bits: int = 16, hint: str = "lwe", codes: Tensor | None = None) -> tuple[RemoteMatrix, HonestChannel, Tensor]:
    codes = random_codes(2 * RANK, K) if codes is None else codes
    parameters = lwe_parameters(hint)
    matrix, _, masks = prepared(codes, parameters)
    channel = HonestChannel(matrix, bits)
    l2 = int(codes.float().norm(dim=1).max()) + 1
    group = ClientGroup(codes.shape[1], l2, (ClientModule("m", 9, codes.shape[0] // 2),))
    found: Any = channel
    return remote_matrix(3, group, bits, parameters, masks, found), channel, codes


def rows_of(count: int, seed: int = 0, columns: int = K) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(bits: int, hint: str = "lwe") -> float:
    matrix, _, codes = remote(bits, hint)
    x = rows_of(40)
    exact = x @ codes.double().t()
    return float((matrix.product(x, lambda: None) - exact).norm() / exact.norm())


@pytest.mark.parametrize("hint", HINTS)
def test_the_error_falls_with_the_bits(hint: str) -> None:
    errors = [error(bits, hint) for bits in (8, 10, 12, 16)]
    assert errors[3] < 5e-4 and errors == sorted(errors, reverse=True)
    assert errors[1] > 2 * errors[2]  # two bits less, four times the rounding


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])  # which stays what it is
@given(st.integers(1, 4), st.floats(1e-20, 1e20), st.integers(0, 99), st.sampled_from([8, 13, 16]))
def test_the_error_is_within_the_bound(count: int, size: float, seed: int, bits: int) -> None:
    matrix, _, codes = remote(bits)
    x = rows_of(count, seed) * size
    y, exact = matrix.product(x, lambda: None), x @ codes.double().t()
    alpha = (2**30 * (1 - 2**-20) - 0.5 * matrix.bounds.l1 - matrix.noise) / (matrix.bounds.l2 * x.norm(dim=1, keepdim=True))
    bound = (matrix.noise + 0.5 * codes.double().abs().sum(1).max()) / alpha  # noise, and the rounding of x
    assert ((y - exact).abs() <= 1.0001 * bound).all()


def test_outliers() -> None:
    matrix, _, codes = remote()
    x = rows_of(20)
    x[:, 5] = 1e4
    exact = x @ codes.double().t()
    assert float((matrix.product(x, lambda: None) - exact).norm() / exact.norm()) < 1e-3


def test_what_is_sent() -> None:
    matrix, channel, codes = remote()
    matrix.product(rows_of(3), lambda: None)
    ((request, c),) = channel.seen
    assert request == Query(1, BUNDLE, 3, 3) and c.shape == (3, 1280 + K) and is_residue(c)
    assert codes.shape[0] == matrix.rows


def test_the_same_row_looks_different_every_time() -> None:
    matrix, channel, _ = remote()
    x = rows_of(1).repeat(4, 1)
    matrix.product(x, lambda: None)
    matrix.product(x, lambda: None)
    rows = torch.cat([c for _, c in channel.seen])
    assert len(rows.unique(dim=0)) == 8
    assert (rows == rows[:1]).double().mean(1)[1:].max() < 0.01


def test_rows_of_zeros_are_asked_like_any_other_and_answered_by_zero() -> None:
    matrix, channel, codes = remote()
    x = rows_of(3)
    x[1] = 0
    x[2] = 2.0**-120
    y = matrix.product(x, lambda: None)
    assert channel.seen[0][0].rows == 3
    assert torch.equal(y[1:], torch.zeros(2, 2 * RANK)) and torch.allclose(y[0], codes.double() @ x[0], rtol=0.05)


def test_no_rows_no_query() -> None:
    matrix, channel, _ = remote()
    done: list[int] = []
    assert matrix.product(rows_of(0), lambda: done.append(1)).shape == (0, 2 * RANK)
    assert channel.seen == [] and done == [1]


def test_many_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rows_per_exchange", lambda *_: 3)
    matrix, channel, codes = remote()
    x = rows_of(8)
    done: list[int] = []
    y = matrix.product(x, lambda: done.append(1))
    assert [request.rows for request, _ in channel.seen] == [3, 3, 2] and done == [1]
    exact = x @ codes.double().t()
    assert float((y - exact).norm() / exact.norm()) < 1e-3


def test_own_work_runs_while_the_server_computes() -> None:
    matrix, channel, _ = remote()
    matrix.product(rows_of(1), lambda: channel.order.append("own"))
    assert channel.order == ["sent", "own"]


# --- the client's checks

BAD = {
    "nan": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "a norm that overflows": 1e200,
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("row", [0, 2])
def test_bad_numbers_are_one_generic_error_and_nothing_is_sent(name: str, row: int) -> None:
    matrix, channel, _ = remote()
    matrix.masks.fill(5)  # type: ignore[attr-defined]
    x = rows_of(3)
    x[row, 4] = BAD[name]
    done: list[int] = []
    with pytest.raises(CheckFailed) as caught:
        matrix.product(x, lambda: done.append(1))
    assert str(caught.value) == "a check of the client failed: the session has ended"
    assert channel.seen == [] and done == []
    assert matrix.masks.ready in (2, 5)  # type: ignore[attr-defined]


def test_all_checks_come_before_the_first_of_several_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the server would see after how many pieces it stopped: log2 of their number in bits, not one."""
    monkeypatch.setattr(module, "rows_per_exchange", lambda *_: 2)
    matrix, channel, _ = remote()
    x = rows_of(6)
    x[5, 0] = math.nan
    with pytest.raises(CheckFailed):
        matrix.product(x, lambda: None)
    assert channel.seen == []


# --- answers


@pytest.mark.parametrize(
    "twist",
    [
        lambda m, q: (Answer(m.id, m.rows + 1), q),
        lambda m, q: (ErrorAnswer(m.id, "internal", "x"), q),
        lambda m, q: (m, q[:-1]),
        lambda m, q: (m, q + b"x"),
        lambda m, q: (m, b""),
    ],
    ids=["rows", "another type", "short", "long", "empty"],
)
def test_malformed_answers(twist: Any) -> None:
    matrix, channel, _ = remote()
    channel.twist = twist
    with pytest.raises((WorkerRefused, MalformedMessage)):  # the real channel makes the former of the latter
        matrix.product(rows_of(2), lambda: None)


def test_a_false_answer_is_not_noticed_and_harms_only_the_output() -> None:
    """Said plainly: the client does not know W. What it sends next does not depend on the answer."""
    matrix, channel, codes = remote()
    channel.twist = lambda message, payload: (message, bytes(len(payload)))
    y = matrix.product(rows_of(2), lambda: None)
    assert y.isfinite().all() and not torch.allclose(y, rows_of(2) @ codes.double().t(), rtol=0.5)


def test_a_mask_is_burnt_by_a_failure() -> None:
    matrix, channel, _ = remote()
    matrix.masks.fill(4)  # type: ignore[attr-defined]
    channel.twist = lambda message, _: (message, b"")
    with contextlib.suppress(Exception):
        matrix.product(rows_of(2), lambda: None)
    assert matrix.masks.ready == 2  # type: ignore[attr-defined]
    channel.twist = lambda message, payload: (message, payload)
    matrix.product(rows_of(2), lambda: None)
    assert len(torch.cat([c for _, c in channel.seen]).unique(dim=0)) == 4


def test_no_secrets_in_a_repr() -> None:
    matrix, _, _ = remote()
    assert "tensor" not in repr(matrix) and "LweMasks object" in repr(matrix)
