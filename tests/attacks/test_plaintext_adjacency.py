"""Fact 1 of the design: whoever sees the plaintext input and output of a split layer solves for its secret part.

The layer is W = E + U V, with E exposed and U V secret. The attack is linear algebra on pairs (what goes in, what comes out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.slip.plaintext_adjacency import solve
from cloven.field.codec import encode, row_bounds
from tests.helpers import HonestExchanger, offloaded, pads_of, random_codes

D, RANK, TOKENS = 48, 3, 96
EXPOSED = random_codes(D, D)  # what the worker holds
NEXT = random_codes(D, D, seed=9)  # the next layer's exposed matrix: its masked input is all the worker sees of this one's output


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SECRET = 40 * gaussian(D, RANK, 1) @ gaussian(RANK, D, 2)
FULL = EXPOSED.to(torch.float64) + SECRET


def error(recovered: Tensor, true: Tensor) -> float:
    """Relative error after the best scale, which the attacker is given: scales are not what is secret."""
    scale = (recovered * true).sum() / (recovered * recovered).sum()
    return float(torch.linalg.norm(scale * recovered - true) / torch.linalg.norm(true))


def test_plaintext_pairs_give_the_secret_part() -> None:
    # the weakened system: activations leave the trusted process as they are
    x = gaussian(TOKENS, D, 3)
    recovered = solve(x, x @ FULL.t())
    assert error(recovered, FULL) < 1e-9
    assert error(recovered - EXPOSED.to(torch.float64), SECRET) < 1e-9


def test_d_pairs_are_enough() -> None:
    x = gaussian(D, D, 3)
    assert error(solve(x, x @ FULL.t()) - EXPOSED.to(torch.float64), SECRET) < 1e-6


def test_rounding_does_not_help() -> None:
    # fixed point alone is no protection: 30 bits of precision are more than the attack needs
    x = gaussian(TOKENS, D, 3)
    x_int, alpha = encode(x, row_bounds(EXPOSED))
    y_int, beta = encode(x @ FULL.t(), row_bounds(NEXT))
    recovered = solve(x_int.to(torch.float64) / alpha, y_int.to(torch.float64) / beta)
    assert error(recovered - EXPOSED.to(torch.float64), SECRET) < 1e-5


def test_masked_transcripts_give_nothing() -> None:
    # the same attack on what really leaves: the masked input, the worker's own answer, and the next layer's masked input
    x = gaussian(TOKENS, D, 3)
    this, following = HonestExchanger(EXPOSED), HonestExchanger(NEXT)
    y = offloaded(EXPOSED, this).product(x) + x @ SECRET.t()
    assert torch.allclose(y, x @ FULL.t(), atol=1e-2)  # the layer works
    offloaded(NEXT, following).product(y)
    c, c_next = (channel.seen[0].to(torch.float64) for channel in (this, following))
    z = this.product(0, this.seen[0]).to(torch.float64)

    for inputs, outputs in ((c, c_next), (z, c_next), (c, z)):
        assert error(solve(inputs, outputs), FULL) > 0.95
        assert error(solve(inputs, outputs) - EXPOSED.to(torch.float64), SECRET) > 0.95


def test_more_tokens_do_not_help() -> None:
    # 20 times as many: a weak dependence would show as a falling error
    x = gaussian(20 * TOKENS, D, 4)
    x_int, _ = encode(x, row_bounds(EXPOSED))
    y_int, _ = encode(x @ FULL.t(), row_bounds(NEXT))
    c = pads_of(EXPOSED).take(len(x)).mask(x_int).to(torch.float64)
    c_next = pads_of(NEXT).take(len(x)).mask(y_int).to(torch.float64)
    assert error(solve(c, c_next), FULL) > 0.98
    # and the plaintext is not in the masked rows: projecting them on x finds nothing
    assert error(solve(c, x), torch.eye(D, dtype=torch.float64)) > 0.98
