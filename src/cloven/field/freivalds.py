"""Freivalds' check of z = W c mod p, at O(N + K) instead of O(N·K).

S is uniform in F_p^{2×N}, full-size entries, secret, drawn for one worker and shared with no other; S·W is computed once from the
trusted side's own verified copy of W. A vector z ≠ W c that was fixed before S was learned passes with probability p^-2 exactly.
An accepted honest answer tells the worker nothing about S; the verdict depends on S and z − W c alone, not on the plaintext.
After the first reject S must be dropped: the caller ends the session.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cloven.errors import VerificationFailed
from cloven.field.products import Backend, PlacedMatrix, multiply
from cloven.field.residues import P, row_blocks

CHECKS = 2  # t: p^-2 < 2^-61
_ROWS_AT_A_TIME = 32  # keeps the float64 halves in the cache
_MAX_WIDTH = 2**22  # 2^15·2^15·2·2^22 = 2^53: float64 sums of 16-bit halves stay exact


def _halves(x: Tensor) -> Tensor:
    """Residues int32 [R, L] -> float64 [2R, L], low halves (in [−2^15, 2^15)) above high halves: x = high·2^16 + low."""
    values = x.numpy()
    low = ((values + 2**15) & 0xFFFF) - 2**15
    return torch.from_numpy(np.concatenate([low, (values - low) >> 16]).astype(np.float64))


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
        transposed = backend.place(w.codes[: w.rows, : w.columns].t())
        sw = multiply(backend, s, transposed).cpu()  # S W: [2, N] @ [N, K] -> [2, K]
        self._test = _halves(torch.cat([s, -sw], dim=1))  # [4, N + K]: S z − (S W) c = 0

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
        wrong = sum(self._wrong_rows(torch.cat(pair, dim=1)) for pair in row_blocks(_ROWS_AT_A_TIME, z, c))
        if wrong:
            raise VerificationFailed(f"{what} is wrong in {wrong} of {c.shape[0]} rows; nothing of it was used")

    def _wrong_rows(self, both: Tensor) -> int:
        """How many rows of z‖c [M, N + K] do not satisfy S z − (S W) c = 0."""
        m = both.shape[0]
        sums = _halves(both) @ self._test.t()  # [2M, 4], exact integers below 2^53
        parts = sums.numpy().astype(np.int64).reshape(2, m, 2, CHECKS) % P  # [half of z‖c, M, half of S, t]
        residual = parts[0, :, 0] + (parts[0, :, 1] + parts[1, :, 0]) * 2**16 + parts[1, :, 1] * 2  # 2^32 ≡ 2 (mod p)
        return int(np.count_nonzero((residual % P).any(axis=1)))
