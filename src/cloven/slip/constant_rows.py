"""Exchanges of a constant number of rows: what is missing is padded, what is too much goes in several.

Every group of linears then sends N rows in every exchange, whatever the model had for it: one token, sixteen of a batch, a piece of a
prompt, or none (the last layer, while a prompt is not yet read to its end). Padding rows are zero, and masked like any other row.

Guarantee: sizes of exchanges say nothing, and a pass of the model over 1 to N rows is the same exchanges as one over N. Not hidden: how
many passes there are, and when.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cloven.errors import BadInput
from cloven.field.native.exchange import FusedExchange
from cloven.offload import OffloadedMatrix
from cloven.wire.limits import rows_per_exchange


class ConstantRows:
    """An `OffloadedMatrix` that sends `rows` rows each time.

    Raises:
        BadInput: so many do not fit in one exchange.
    """

    def __init__(self, offloaded: OffloadedMatrix, rows: int) -> None:
        most = rows_per_exchange(offloaded.columns, offloaded.rows)
        if not 0 < rows <= most:
            raise BadInput(f"constant_rows {rows}: {offloaded.name} takes 1 to {most} rows in one exchange")
        self._offloaded, self._rows = offloaded, rows

    def product(self, x: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        """See `OffloadedMatrix.product`."""
        results = []
        for start in range(0, max(1, len(x)), self._rows):
            y = self._offloaded.product(self._padded(x[start : start + self._rows]), meanwhile if start == 0 else lambda: None)
            results.append(y[: len(x) - start])
        return torch.cat(results)

    def fused(self, x: Tensor, exchange: FusedExchange, out: Tensor, meanwhile: Callable[[Tensor], None]) -> bool:
        """See `OffloadedMatrix.fused`."""
        if not len(x):
            return False
        total = torch.empty(len(x), out.shape[1], dtype=torch.float32)
        for start in range(0, len(x), self._rows):
            rows = slice(start, min(start + self._rows, len(x)))
            answers = out.new_empty(self._rows, out.shape[1])

            def then(own: Tensor, first: bool = start == 0, rows: slice = rows) -> None:
                if first:
                    meanwhile(total)
                own.zero_()[: rows.stop - rows.start] = total[rows]

            if not self._offloaded.fused(self._padded(x[rows]), exchange, answers, then):
                return False  # several workers: at the first rows, before anything was done
            out[rows] = answers[: rows.stop - rows.start]
        return True

    def _padded(self, x: Tensor) -> Tensor:
        if len(x) == self._rows:
            return x.contiguous()
        padded = x.new_zeros(self._rows, x.shape[1])
        padded[: len(x)] = x
        return padded
