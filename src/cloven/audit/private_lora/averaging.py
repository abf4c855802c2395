"""Can the rounding of answers be averaged away?

Adversary: A6, a client that wants the adapter and asks one query again and again.
Method: 64 answers to one query, a random one, are averaged and compared with the exact product.
Success: the share of the squared rounding error that is gone.
Weakened: a server that adds fresh noise to every answer before it rounds.
Source: textbook; rounding without fresh noise is the scheme's answer to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cloven.audit.attack import Attack, verdict_of
from cloven.audit.private_lora.subject import CLIENT, SCHEME, Target
from cloven.field.products import multiply
from cloven.field.residues import H, centre, subtract
from cloven.field.selection import select_backend

_REPEATS = 64


def averaging(target: Target) -> list[Attack]:
    """See the module."""
    c = torch.randint(-H, H + 1, (1, target.matrix.shape[1]), dtype=torch.int32, generator=target.random)
    exact = multiply(select_backend("cpu"), c, select_backend("cpu").place(target.matrix))

    def remaining(answer: Callable[[], Tensor]) -> float:
        errors = [subtract(answer(), exact).double() for _ in range(_REPEATS)]
        return float(torch.stack(errors).mean(0).square().mean() / torch.stack(errors).square().mean())

    def noisy() -> Tensor:
        step = 2.0 ** (31 - target.bits)
        dither = (torch.rand(exact.shape, generator=target.random, dtype=torch.float64) - 0.5) * 2 * step
        return target.rounded(centre(exact.long() + dither.round().long()))

    value, weakened = 1 - remaining(lambda: target.answer(c)), 1 - remaining(noisy)
    metric = f"share of the squared rounding error that averaging {_REPEATS} answers to one query takes away"
    return [Attack("averaging", SCHEME, CLIENT, metric, value, 0.0, weakened, _REPEATS, verdict_of(value, 0.0, _REPEATS))]
