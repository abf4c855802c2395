"""A worker that lies, for `tests.helpers.FakeWorker`."""

from __future__ import annotations

from pathlib import Path

import torch

from cloven.field.residues import centre
from cloven.wire.messages import Multiply, Product, pack, residue_frame, residues_of_frame, unpack
from cloven.wire.schema import AskLane, Hello, Laned, Welcome
from cloven.worker.matrices import Matrices


class Liar:
    """A worker that computes rightly and then changes one entry of one answer: the most modest lie there is."""

    def __init__(self, exposed: Path, lie_at: int) -> None:
        self.matrices = Matrices.load(exposed, "cpu")
        self.products = 0
        self.lie_at = lie_at

    def __call__(self, frames: list[bytes]) -> list[list[bytes]]:
        message, payload = unpack(list(frames))
        if isinstance(message, Hello):
            return [[pack(Welcome(message.id, message.bundle, len(self.matrices.groups)))]]
        if isinstance(message, AskLane):
            return [[pack(Laned(message.id, ""))]]
        assert isinstance(message, Multiply) and payload is not None
        z = self.matrices.multiply(message.group, residues_of_frame(payload, message.rows, self.matrices.groups[message.group].columns))
        self.products += 1
        if self.products == self.lie_at:
            z = centre(z.long().index_put_((torch.tensor(0), torch.tensor(7)), torch.tensor(1), accumulate=True))
        return [[pack(Product(message.id, message.rows)), bytes(residue_frame(z))]]
