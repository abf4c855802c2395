"""An adapter server's answers over a lane without Python: the worker's loop (`cloven.worker.lane_products`), metered.

    1. C++ takes the rows of a query from the lane's credit for the group; there is none before the ledger has lent it
    2. where that is too small, the ledger is charged, and lends up to a block; durable before anything is computed
    3. z = W' c mod p; the highest b bits leave
    4. what is left of the credit goes back to the ledger when others at this server need it, and when the lane's serving ends

Guarantee to the owner: that of `cloven.private_lora.server`, in the same order; at no time are more rows answered than were charged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cloven.errors import BudgetExhausted, LedgerUnusable
from cloven.field.products import Backend, PlacedMatrix
from cloven.metrics.counts import ServerCounts
from cloven.private_lora.ledger import Ledger
from cloven.wire.lane import Lane, LaneGone
from cloven.worker.lane_products import Credit, LaneProducts, Metered


class LaneAnswers:
    """The answers of one adapter.

    Args:
        products: its matrices.
        names: the groups', as the ledger has them.
        bits: b.
        ledger: charged before anything is answered.
    """

    def __init__(self, products: LaneProducts, names: Sequence[str], bits: int, ledger: Ledger) -> None:
        self.most = products.most
        self._products, self._names, self._bits, self._ledger = products, names, bits, ledger

    @classmethod
    def of(cls, backend: Backend, matrices: Sequence[PlacedMatrix], names: Sequence[str], bits: int, ledger: Ledger) -> LaneAnswers | None:
        """None where the kernels, or the loop, are not compiled."""
        products = LaneProducts.of(backend, matrices)
        return cls(products, names, bits, ledger) if products is not None else None

    def serve(self, lane: Lane, going_on: Callable[[], bool], counts: ServerCounts, client: str) -> None:
        """Answer what the client asks over the lane, and count it, until something else comes, or `going_on` says no.

        Raises:
            LaneGone: the ledger lends nothing; the client asks again through the socket, and hears why.
        """
        credit = Credit(len(self._names))

        def recall() -> list[tuple[str, str, int]]:
            return [(name, client, credit.take(group)) for group, name in enumerate(self._names)]

        def grant(group: int, rows: int) -> None:
            try:
                self._ledger.lend(self._names[group], client, rows, lambda lent: credit.add(group, lent))
            except (BudgetExhausted, LedgerUnusable) as error:
                raise LaneGone("the ledger lends nothing: the socket says why") from error

        with self._ledger.lending(recall):
            self._products.serve(lane, going_on, counts, Metered(self._bits, credit, grant))
