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
again under it. The rows of W may be spread over several workers: they get the same c, and each answer is checked with a secret S of its
own. When a worker is gone and another one holds the same rows, steps 2 to 5 are done again with fresh pads.

Guarantee: the workers see uniform residues, whatever x is (AES-256), and a wrong answer is used with probability ≤ p^-2 per session and
worker. Not hidden: the number of rows, and when they are sent. Source: design of the project, section 2; the pads are SLIP's (arXiv
2407.10886).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from cloven.errors import ClovenError, RunError, SessionClosed, VerificationFailed, WorkerTimeout, WorkerUnreachable
from cloven.field.codec import NOT_FINITE, RowBounds, decode, encode, scale_of
from cloven.field.freivalds import Freivalds
from cloven.field.native.exchange import FusedExchange
from cloven.masks.one_time import MaskSource
from cloven.masks.waiting import Pads
from cloven.wire.channel import Exchanger
from cloven.wire.limits import rows_per_exchange

MOST_MOVES = 8  # to other workers, for one product
_T = TypeVar("_T")


class Holder(Protocol):
    """Who holds some rows of W now: a worker, or the one of several replicas that is in use."""

    def current(self, group: int) -> tuple[Exchanger, Freivalds]:
        """The connection to it, and the check of its answers, with a secret S that no other worker's answers meet."""

    def move(self, gone: Exchanger, error: ClovenError) -> None:
        """Who was reached by `gone` is gone: go on with another one (unless another thread has done so), or raise the error."""


@dataclass(frozen=True)
class OneWorker:
    """A holder without a replica."""

    exchanger: Exchanger
    check: Freivalds

    def current(self, group: int) -> tuple[Exchanger, Freivalds]:
        """See `Holder`."""
        del group
        return self.exchanger, self.check

    def move(self, gone: Exchanger, error: ClovenError) -> NoReturn:
        """See `Holder`."""
        del gone
        raise error


@dataclass(frozen=True)
class Share:
    """The next `rows` rows of W, and who holds them."""

    rows: int
    holder: Holder


class _Gone(Exception):
    """A holder did not answer; not an error yet."""

    def __init__(self, holder: Holder, channel: Exchanger, error: ClovenError) -> None:
        super().__init__()
        self.holder, self.channel, self.error = holder, channel, error


@dataclass(frozen=True)
class OffloadedMatrix:
    """One group's integer matrix W [rows, columns] at its workers, as the holder of x sees it; `shares` in the order of the rows."""

    name: str
    group: int
    rows: int
    columns: int
    bounds: RowBounds
    masks: MaskSource
    shares: tuple[Share, ...]

    def product(self, x: Tensor, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        """y = W x for every row of x.

        Args:
            x: float64 [M, K].
            meanwhile: trusted work to do while the workers compute; called once.

        Returns:
            float64 [M, N]: W x up to the rounding of x to fixed point, |error| ≤ ½‖W_j‖₁/α.

        Raises:
            RunError: x is not finite (before a pad is taken), or a worker is absent, silent or refuses.
            VerificationFailed: an answer is wrong; nothing of it was used.
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

        def attempt(pads: Pads, once: Callable[[], None]) -> Tensor:
            return pads.unmask(self._answers(pads.mask(x_int), self.shares, once))  # 2, 3 and 4, 5

        return self._until_answered(x_int.shape[0], attempt, meanwhile)

    def fused(self, x: Tensor, exchange: FusedExchange, out: Tensor, meanwhile: Callable[[Tensor], None]) -> bool:
        """The same with one native call before the exchange and one after it, and x and W x in the holder's own basis.

        Args:
            x: [M, K], float32 or bfloat16, dense.
            out: [M, N], float32 or bfloat16, for the sum of W x and what `meanwhile` makes.
            meanwhile: trusted work to do while the worker computes: it fills a float32 [M, N]; called once.

        Returns:
            False where that cannot be: several workers, or too many rows; then nothing was done.

        Raises:
            RunError, VerificationFailed: as of `product`; pads are burnt if x is not finite.
        """
        if len(self.shares) != 1 or not 0 < len(x) <= rows_per_exchange(self.columns, self.rows):
            return False
        (share,), what, between = self.shares, f"{self.name}: the worker's answer", exchange.buffers(len(x))

        def attempt(pads: Pads, once: Callable[[], None]) -> bool:
            if not exchange.ask(x, scale_of(self.bounds), pads.masks(x.shape), between):  # 1, 2
                raise RunError(NOT_FINITE)
            z, channel, freivalds = self._answer(between.c, share, once, between.z)  # 3
            image = pads.images(z.shape)
            with _named(channel):
                freivalds.check_by(lambda test: exchange.told(test, z, image, between, out), len(x), what)  # 4, 5, 6
            return True

        return self._until_answered(len(x), attempt, lambda: meanwhile(between.total))

    def _until_answered(self, rows: int, attempt: Callable[[Pads, Callable[[], None]], _T], meanwhile: Callable[[], None]) -> _T:
        """An attempt with fresh pads; again, with others, while workers are gone and there are others."""
        work = [meanwhile]

        def once() -> None:
            if work:
                work.pop()()

        moved = 0
        while True:
            pads = self.masks.take(rows)
            try:
                return attempt(pads, once)
            except _Gone as gone:
                if moved == MOST_MOVES:  # workers that greet and never answer must not use up pads for ever
                    raise gone.error from gone
                gone.holder.move(gone.channel, gone.error)
                moved += 1

    def _answers(self, c: Tensor, shares: Sequence[Share], meanwhile: Callable[[], None]) -> Tensor:
        """z [M, N], verified: c goes to all holders before the first answer is waited for."""
        share, rest = shares[0], shares[1:]
        others: list[Tensor] = []

        def then() -> None:
            if rest:
                others.append(self._answers(c, rest, meanwhile))
            else:
                meanwhile()

        z, channel, freivalds = self._answer(c, share, then)
        with _named(channel):
            freivalds.check(c, z, f"{self.name}: the worker's answer")
        return torch.cat([z, *others], dim=1) if others else z

    def _answer(
        self, c: Tensor, share: Share, meanwhile: Callable[[], None], into: Tensor | None = None
    ) -> tuple[Tensor, Exchanger, Freivalds]:
        """z [M, rows of the share], unverified; from whom, and its check."""
        channel, freivalds = share.holder.current(self.group)
        try:
            return channel.multiply(self.name, self.group, c, share.rows, meanwhile, into), channel, freivalds
        except (WorkerUnreachable, WorkerTimeout, SessionClosed) as error:
            raise _Gone(share.holder, channel, error) from error


@contextlib.contextmanager
def _named(channel: Exchanger) -> Iterator[None]:
    """A verification that fails says whose secret S must be dropped."""
    try:
        yield
    except VerificationFailed as error:
        error.worker = str(getattr(channel, "address", ""))
        raise
