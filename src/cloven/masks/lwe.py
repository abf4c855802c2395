"""Masks that are LWE samples: the client can subtract their image without knowing W.

    mask    m = A_pub s + e     s ∈ χ^n, e ∈ χ^D, fresh for every row
    image   u = H s             H = W' A_pub + E_h, the hint that the holder of W published

so that  z − u = W'(x_int + m) − H s = W x_int + W' e − E_h s: the product, and a small error. Made in batches: A_pub s for many s is one
product of int8 matrices, with the digits of A_pub on the left.

Guarantee: c = x_int + m hides x_int from whoever lacks s, under LWE with the parameters of `lwe_parameters`, whatever W and H are. Every
row has 32 fresh bytes of the operating system as its only key: no counter, no stored state, no seed argument. Not hidden: the number of
rows and when they are sent. Source: design of the project, section 5; private LoRA is arXiv 2501.01672.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from cloven.field.gaussian import gaussians
from cloven.field.prg import KEY_BYTES
from cloven.field.products import DIGITS, Backend, combine, digits
from cloven.field.residues import add
from cloven.masks.lwe_parameters import LweParameters
from cloven.masks.public_matrix import a_pub_planes
from cloven.masks.waiting import WaitingPads

_BYTES_AT_A_TIME = 64 * 2**20


class LweMasks(WaitingPads):
    """The masks of one group.

    Args:
        hint: H, residues int32 [N, n].
        columns: D, the pad columns of W' and those of W.
        parameters: n and the distributions.
        backend: for the products with A_pub and H, on the CPU.
    """

    def __init__(self, hint: Tensor, columns: int, parameters: LweParameters, backend: Backend) -> None:
        super().__init__()
        self._parameters, self._backend, self._columns = parameters, backend, columns
        self._hint_planes = digits(hint).permute(0, 2, 1).contiguous()  # [N, 4, n]

    def _make(self, first: int, rows: int) -> tuple[Tensor, Tensor]:
        del first  # nothing follows from a row's number
        step = max(1, _BYTES_AT_A_TIME // (4 * DIGITS * self._columns))
        batches = [self._batch_of(min(step, rows - start)) for start in range(0, rows, step)] or [self._batch_of(0)]
        masks, images = zip(*batches, strict=True)
        return torch.cat(masks), torch.cat(images)

    def _batch_of(self, rows: int) -> tuple[Tensor, Tensor]:
        keys = [os.urandom(KEY_BYTES) for _ in range(rows)]
        n = self._parameters.n
        samples = gaussians(keys, n + self._columns, self._parameters.sigma)
        s = torch.from_numpy(np.ascontiguousarray(samples[:, :n]))
        e = torch.from_numpy(samples[:, n:].astype(np.int32))
        mask = add(self._times(s, a_pub_planes(self._columns)), e)
        return mask, self._times(s, self._hint_planes)

    def _times(self, s: Tensor, planes: Tensor) -> Tensor:
        """s [M, n] times a matrix of residues, given by its digits [rows, 4, n] -> residues int32 [M, rows]."""
        placed = self._backend.place(planes.flatten(0, 1))
        product = self._backend.small(s, placed).view(s.shape[0], planes.shape[0], DIGITS)
        result = torch.empty(s.shape[0], planes.shape[0], dtype=torch.int32)
        combine(product.permute(2, 0, 1), result)
        return result
