"""The one protocol under everything: masked linear offload.

The holder of a secret vector x wants W x for an integer matrix W [N, K] that a worker holds.

     holder of x                                              worker (W int8 [N, K])
  1  x_int = encode(x)            fixed point, no wrap
  2  c     = x_int + m  mod p     m is fresh         -- c -->
  3                                                  <-- z --  z = W c  mod p
  4  S z  == (S W) c              Freivalds, or the session ends
  5  W x_int = z − u  mod p       u = W m, unmask
  6  y     = decode(W x_int)

One row of x is one pad; padding rows are masked like any other. A pad whose answer is lost or wrong is burnt: nothing is ever encoded
again under it.

Guarantee: the worker sees uniform residues, whatever x is (AES-256), and a wrong answer is used with probability ≤ p^-2 per session.
Not hidden: the number of rows, and when they are sent. Source: design of the project, section 2; the pads are SLIP's (arXiv 2407.10886).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cloven.field.codec import RowBounds, decode, encode
from cloven.field.freivalds import Freivalds
from cloven.masks.one_time import MaskSource
from cloven.wire.channel import Exchanger
from cloven.wire.limits import rows_per_exchange


@dataclass(frozen=True)
class OffloadedMatrix:
    """One group's integer matrix W [rows, columns] at a worker, as the holder of x sees it."""

    name: str
    group: int
    rows: int
    columns: int
    bounds: RowBounds
    masks: MaskSource
    freivalds: Freivalds
    channel: Exchanger

    def product(self, x: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        """y = W x for every row of x.

        Args:
            x: float64 [M, K].
            meanwhile: trusted work to do while the worker computes; called once.

        Returns:
            float64 [M, N]: W x up to the rounding of x to fixed point, |error| ≤ ½‖W_j‖₁/α.

        Raises:
            RunError: x is not finite (before a pad is taken), or the worker is absent, silent or refuses.
            VerificationFailed: the answer is wrong; nothing of it was used.
        """
        if not x.shape[0]:
            meanwhile()
            return x.new_empty(0, self.rows)
        pieces = x.split(rows_per_exchange(self.columns, self.rows))
        results = [self._exchange(piece, meanwhile if i == 0 else lambda: None) for i, piece in enumerate(pieces)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _exchange(self, x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        x_int, alpha = encode(x, self.bounds)  # 1
        return decode(self.integer_product(x_int, meanwhile), alpha)  # 6

    def integer_product(self, x_int: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        """Steps 2 to 5: W x_int mod p, exactly, for residues int32 [M, K] -> int32 [M, N]."""
        pads = self.masks.take(x_int.shape[0])
        c = pads.mask(x_int)  # 2
        z = self.channel.multiply(self.name, self.group, c, self.rows, meanwhile)  # 3
        self.freivalds.check(c, z, f"{self.name}: the worker's answer")  # 4
        return pads.unmask(z)  # 5
