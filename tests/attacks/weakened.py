"""SLIP with one of its rules broken, built by hand: shows that the attacks of this folder work when there is something to find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cloven.field.prg import SecretStream
from cloven.masks.one_time import PadKey
from cloven.slip.decomposition import Split, truncated_svd


def split_without_decoy(w: Tensor, rank: int, values: Tensor, stream: SecretStream) -> Split:
    """The plain SVD split: R = W − U_k Σ_k V_kᵀ has U_k and V_k as null spaces."""
    del values
    w = w.double()
    u, s, vt = truncated_svd(w, rank, stream)
    return Split(w - (u * s) @ vt, vt, u * s)


def split_with_copied_values(w: Tensor, rank: int, values: Tensor, stream: SecretStream) -> Split:
    """A decoy whose values are copies of kept singular values: each of them is then in the exposed spectrum twice."""
    w = w.double()
    u, s, vt = truncated_svd(w, rank, stream)
    kept = values[rank:]
    decoy = kept[(torch.from_numpy(stream.uniform(rank)) * len(kept)).long(), None] * stream.orthogonal(rank)
    secret_b = u @ (torch.diag(s) - decoy)
    return Split(w - secret_b @ vt, vt, secret_b)


def pads_used_again(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Sessions that open from now on use pad i again as pad i + after."""
    honest = PadKey.residues

    def again(self: PadKey, group: int, first: int, rows: int, width: int) -> Tensor:
        return honest(self, group, 0, after, width)[(first + torch.arange(rows)) % after].contiguous()

    monkeypatch.setattr(PadKey, "residues", again)
