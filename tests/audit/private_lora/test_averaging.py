from __future__ import annotations

import torch
from torch import Tensor

from cloven.audit.private_lora.averaging import averaging
from cloven.audit.private_lora.subject import Target
from cloven.field.products import multiply
from cloven.field.residues import centre
from cloven.field.selection import select_backend
from tests.audit.private_lora.targets import generator, target


def test_averaging_takes_nothing_away_from_one_answer() -> None:
    (attack,) = averaging(target())
    assert attack.value < 1e-9 and attack.verdict == "holds" and attack.weakened_value > 0.95


class Dithering(Target):
    """A server that adds fresh noise before it rounds."""

    def answer(self, c: Tensor) -> Tensor:
        z = multiply(select_backend("cpu"), c, select_backend("cpu").place(self.matrix)).long()
        step = 2 ** (31 - self.bits)
        return self.rounded(centre(z + torch.randint(-step, step, z.shape, generator=DITHER)))


DITHER = generator(9)


def test_averaging_breaks_a_server_with_fresh_noise() -> None:
    (attack,) = averaging(Dithering(**vars(target())))
    assert attack.value > 0.9 and attack.verdict == "broken"
