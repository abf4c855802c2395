"""Freivalds' check of z = W c mod p, at O(N + K) instead of O(N·K).

S is uniform in F_p^{2×N}, full-size entries, secret, drawn for one worker and shared with no other; S·W is computed once from the
trusted side's own verified copy of W. A vector z ≠ W c that was fixed before S was learned passes with probability p^-2 exactly.
An accepted honest answer tells the worker nothing about S; the verdict depends on S and z − W c alone, not on the plaintext.
After the first reject S must be dropped: the caller ends the session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cloven.errors import VerificationFailed
from cloven.field.native.library import kernels_in_use
from cloven.field.products import Backend, PlacedMatrix, multiply
from cloven.field.residues import P, row_blocks

CHECKS = 2  # t: p^-2 < 2^-61
_ROWS_AT_A_TIME = 16  # keeps the float64 halves in the cache
_MAX_WIDTH = 2**22  # 2^15·2^15·2·2^22 = 2^53: float64 sums of 16-bit halves stay exact


def _halves(x: Tensor) -> npt.NDArray[np.float64]:
    """Residues int32 [R, L] -> float64 [R, L, 2], both halves in [−2^15, 2^15]: x = high·2^16 + low.

    Adding 2^15 makes the low half an offset of 2^15, and the exclusive or takes the offset off again.
    """
    balanced = x.numpy() + np.int32(2**15)
    balanced ^= np.int32(2**15)
    return balanced.view(np.int16).astype(np.float64).reshape(*x.shape, 2)


class Freivalds:
    """Checks products with one matrix (or one stack of matrices) W [N, K].

    Args:
        s: the secret S, residues int32 [2, N].
        backend, w: W as placed by the back end; read once, here.

    Guarantee: `check` lets a wrong row pass with probability ≤ p^-2, once per S. Assumes that S stays secret and that `w` is
    the true matrix. Does not hide anything: it is arithmetic on masked values.
    """

    def __init__(self, s: Tensor, backend: Backend, w: PlacedMatrix) -> None:
        if s.shape != (CHECKS, w.rows) or w.rows + w.columns > _MAX_WIDTH:
            raise ValueError(f"S of shape {tuple(s.shape)} does not fit a matrix [{w.rows}, {w.columns}]")
        self._prepare(s, image_of(s, backend, w))

    @classmethod
    def stored(cls, s: Tensor, sw: Tensor) -> Freivalds:
        """From S and S·W, residues int32 [2, K], that were computed earlier from the verified W."""
        check = cls.__new__(cls)
        check._prepare(s, sw)
        return check

    def _prepare(self, s: Tensor, sw: Tensor) -> None:
        self._test = torch.cat([s, -sw], dim=1).contiguous()  # [2, N + K]: S ‖ −S W
        self._test_halves: npt.NDArray[np.float64] | None = None  # [4, N + K], low and high half of each row; without kernels

    def __repr__(self) -> str:
        return "Freivalds(<secret>)"

    def check(self, c: Tensor, z: Tensor, what: str) -> None:
        """Accept z = W c row by row, or raise.

        Args:
            c: residues, int32 [M, K]; z: residues, int32 [M, N].
            what: what is being checked, for the error ("the answer for layer …").

        Raises:
            VerificationFailed: some row of z is wrong.
        """
        kernels = kernels_in_use()
        if kernels is not None:
            wrong = kernels.wrong_rows(self._test, z, c)
        else:
            wrong = sum(self.wrong_rows_in_numpy(torch.cat(pair, dim=1)) for pair in row_blocks(_ROWS_AT_A_TIME, z, c))
        _require_none(wrong, c.shape[0], what)

    def check_by(self, kernel: Callable[[Tensor], int], rows: int, what: str) -> None:
        """Accept what a kernel computes from the test S ‖ −S W, int32 [2, N + K], on the way: the number of wrong rows, of so many.

        Raises:
            VerificationFailed: as of `check`.
        """
        _require_none(kernel(self._test), rows, what)

    def wrong_rows_in_numpy(self, both: Tensor) -> int:
        """How many rows of z ‖ c [M, N + K] do not satisfy S z − (S W) c = 0: without the kernel, and its oracle."""
        if self._test_halves is None:
            self._test_halves = _halves(self._test).transpose(0, 2, 1).reshape(2 * CHECKS, -1).copy()
        sums: Any = (self._test_halves @ _halves(both)).astype(np.int64)  # [4, N + K] @ [M, N + K, 2] -> [M, 4, 2], exact below 2^53
        return sum(any(_residual(rows) for rows in zip(row[::2], row[1::2], strict=True)) for row in sums.tolist())


def _require_none(wrong: int, rows: int, what: str) -> None:
    if wrong:
        raise VerificationFailed(f"{what} is wrong in {wrong} of {rows} rows; nothing of it was used")


def image_of(s: Tensor, backend: Backend, w: PlacedMatrix) -> Tensor:
    """S W, residues int32 [2, K]: [2, N] @ [N, K]."""
    return multiply(backend, s, backend.place(w.codes[: w.rows, : w.columns].t())).cpu()


def _residual(rows: tuple[list[int], list[int]]) -> int:
    """One entry of S z − (S W) c mod p, from the sums with the low and the high half of S; each for both halves of z ‖ c."""
    (low_low, low_high), (high_low, high_high) = rows
    return (low_low + (low_high + high_low) * 2**16 + high_high * 2**32) % P
