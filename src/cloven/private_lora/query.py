"""One query: the protocol of `cloven.offload` with masks that are LWE samples.

     client                                                     adapter server (W' = [R | W] int8 [N, D])
  1  x_int = encode(x)            zero on the pad columns
  2  c     = x_int + A_pub s + e  mod p         -- c -->
  3                                             <-- q --        z = W' c mod p, rounded to b bits
  4  y_int = z − H s  mod p       = W x_int + W' e − E_h s + rounding
  5  y     = y_int / α

Guarantee: the server sees LWE samples, whatever x is and whatever W', H and its answers are. Not verified: the answer; a false one makes
the output wrong. What depends on x and goes wrong (numbers that are not finite, a norm that overflows) ends the session with one generic
error and without a word to the server, which learns no more than where the session stopped, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloven.errors import RunError
from cloven.field.codec import RowBounds, decode, encode, scale_of
from cloven.field.native import query as native
from cloven.field.native.library import kernels_in_use
from cloven.masks.waiting import MaskSource, Pads
from cloven.private_lora.fhe import FheClient
from cloven.private_lora.messages import OUT_OF_RANGE, Answer, Encrypted, EncryptedAnswer, Query, answer_bytes, unrounded
from cloven.wire.channel import Channel
from cloven.wire.limits import rows_per_exchange
from cloven.wire.schema import MalformedMessage

_FAILED = "a check of the client failed: the session has ended"


class CheckFailed(RunError):
    """One of the client's own checks failed; which one, nobody is told."""


@dataclass(frozen=True)
class EncryptedMatrix:
    """One group's integer matrix W [rows, columns] at an adapter server that answers by homomorphic encryption: see `fhe`."""

    name: str
    group: int
    rows: int
    columns: int
    bounds: RowBounds
    keys: FheClient
    channel: Channel

    def product(self, x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        """W x for rows x float64 [M, K] -> float64 [M, N], up to the rounding of x.

        Raises:
            CheckFailed: generic.  RunError: the server is absent, silent or refuses.
        """
        x_int, alpha = checked_encoding(x, self.bounds, 0.0)
        meanwhile()
        y = torch.stack([self._row(row) for row in x_int]) if len(x_int) else x_int.new_empty(0, self.rows)
        return decode(y, alpha)

    def _row(self, x_int: Tensor) -> Tensor:
        def parse(message: Any, payload: memoryview | None) -> Tensor | None:
            if not isinstance(message, EncryptedAnswer) or payload is None:
                return None
            return self.keys.result(payload, self.rows, self.columns)

        request = Encrypted(self.channel.next_id(), self.channel.bundle, self.group)
        return self.channel.exchange(self.name, request, [self.keys.query(x_int)], parse)


def checked_encoding(x: Tensor, bounds: RowBounds, noise: float) -> tuple[Tensor, Tensor]:
    """`encode`, whose reasons to fail stay with the client.

    Raises:
        CheckFailed: generic.
    """
    try:
        return encode(x, bounds, noise)
    except RunError as error:
        raise CheckFailed(_FAILED) from error


def masked_query(x: Tensor, pad: int, bounds: RowBounds, noise: float, pads: Pads) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2: rows x float64 [M, K] -> c, residues int32 [M, pad + K], and α float64 [M, 1]: in C++ where it was compiled.

    A row of zeros is asked like any other, and its answer is noise: its α is ∞. Pads are burnt where the check fails.

    Raises:
        CheckFailed: generic.
    """
    kernels = kernels_in_use()
    if kernels is None:
        x_int, alpha = checked_encoding(x, bounds, noise)
        alpha[~x_int.any(1)] = torch.inf
        return pads.mask(torch.nn.functional.pad(x_int, (pad, 0))), alpha
    mask = pads.masks(torch.Size((x.shape[0], pad + x.shape[1])))
    asked = native.query(kernels, x, pad, scale_of(bounds, noise), mask)
    if asked is None:
        raise CheckFailed(_FAILED)
    return asked


def decoded_answer(q: Tensor | memoryview, rows: int, width: int, bits: int, pads: Pads, alpha: Tensor) -> Tensor:
    """Steps 4 and 5: the payload of an answer -> y float64 [rows, width]: in C++ where it was compiled.

    Raises:
        MalformedMessage: wrong size, or numbers of more than `bits` bits.
    """
    kernels = kernels_in_use()
    if kernels is None or q.nbytes != answer_bytes(rows, width, bits):
        frame: Any = q.numpy() if isinstance(q, Tensor) else q
        return decode(pads.unmask(unrounded(memoryview(frame), rows, width, bits)), alpha)
    y = native.answer(kernels, q, bits, pads.images(torch.Size((rows, width))), alpha)
    if y is None:
        raise MalformedMessage("size", OUT_OF_RANGE)
    return y


@dataclass(frozen=True)
class RemoteMatrix:
    """One group's integer matrix W [rows, columns] at the adapter server, behind `pad` columns.

    Args:
        noise: bound on what an answer is off by.
        bits: b of an answer.
    """

    name: str
    group: int
    rows: int
    columns: int
    pad: int
    bits: int
    bounds: RowBounds
    noise: float
    masks: MaskSource
    channel: Channel

    def product(self, x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        """W x for rows x float64 [M, K] -> float64 [M, N], with the error of `LweParameters.noise` at most, in units of 1/α.

        Args:
            meanwhile: the client's own work while the server computes; called once.

        Raises:
            CheckFailed: generic.  RunError: the server is absent, silent or refuses.
        """
        if not x.shape[0]:
            meanwhile()
            return x.new_empty(0, self.rows)
        step = rows_per_exchange(self.pad + self.columns, self.rows)
        if x.shape[0] <= step:
            return self._exchange(x, meanwhile)
        checked_encoding(x, self.bounds, self.noise)  # all rows, before the first one is sent
        return torch.cat([self._exchange(piece, meanwhile if i == 0 else lambda: None) for i, piece in enumerate(x.split(step))])

    def _exchange(self, x: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        rows = x.shape[0]
        pads = self.masks.take(rows)
        c, alpha = masked_query(x, self.pad, self.bounds, self.noise, pads)  # 1, 2
        q = torch.empty(answer_bytes(rows, self.rows, self.bits), dtype=torch.uint8)
        payload = self.channel.rows(self.name, self.group, c, (Query, Answer), q, meanwhile)  # 3
        found = q if payload is None else payload
        return self.channel.parsed(self.name, lambda: decoded_answer(found, rows, self.rows, self.bits, pads, alpha))  # 4, 5
