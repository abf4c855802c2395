"""The enclave's arithmetic in PyTorch: norms, keys, and undoing them. Where native/step.cpp was built, it stands in for all but `cover`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cloven.field.prg import SecretStream
from cloven.kv_shield.keys import SessionKeys
from cloven.kv_shield.shapes import AttentionShape


def normed(qk: Tensor, norms: Tensor, shape: AttentionShape) -> Tensor:
    """RMS norms of q and k per head, as transformers computes them: in float32, then the weight in the vectors' dtype.

    Args:
        qk: q ‖ k [B, S, (H + G)·d].
        norms: weights of the heads' norms [H + G, d].
    """
    assert shape.norm_epsilon is not None
    heads = qk.unflatten(-1, (-1, shape.head_dim)).float()
    heads = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + shape.norm_epsilon)
    weighted: Tensor = norms.to(qk.dtype) * heads.to(qk.dtype)
    return weighted.flatten(-2)


def keyed(qk: Tensor, v: Tensor, keys: SessionKeys, shape: AttentionShape, random: Tensor) -> Tensor:
    """q' = [q, 0] F⁻ᵀ ‖ k' = [k, ν] F ‖ v' = [v, ν] F_v: [B, S, (H + 2G)·D], D = d + ρ, in the vectors' dtype.

    Args:
        qk, v: q ‖ k [B, S, (H + G)·d], rotated, and v [B, S, G·d].
        keys: of every sequence.
        random: standard Gaussians [B, 2, G, S, ρ]; ν is these, of the level of k and v.
    """
    (b, s), g, d = qk.shape[:2], shape.kv_heads, shape.head_dim
    noise = random.shape[-1]
    size, q_width, (wide, *narrow) = d + noise, shape.widths()[0], shape.widths(noise)
    out = torch.empty(b, s, wide + sum(narrow), dtype=qk.dtype)
    q = torch.empty(b, g, s, shape.heads // g, d)
    q.copy_(qk[..., :q_width].view(b, s, g, -1, d).transpose(1, 2))
    keyed_q = q.flatten(2, 3) @ keys.inverse[:, 0, :, :d]  # [q, 0] F⁻ᵀ needs the first d rows
    out[..., :wide].view(b, s, g, -1, size).copy_(keyed_q.view(b, g, s, -1, size).transpose(1, 2))
    rows = torch.empty(b, 2, g, s, size)  # [k, ν] and [v, ν]
    for part, plain in enumerate((qk[..., q_width:], v)):
        rows[:, part, ..., :d] = plain.view(b, s, g, d).transpose(1, 2)
    level = torch.linalg.vector_norm(rows[..., :d], dim=-1, keepdim=True) * d**-0.5
    torch.mul(random, level, out=rows[..., d:])
    out[..., wide:].view(b, s, 2, g, size).copy_((rows @ keys.kv).permute(0, 3, 1, 2, 4))
    return out


def restored(a: Tensor, keys: SessionKeys, shape: AttentionShape, noise: int) -> Tensor:
    """(a' F_v⁻¹)[: d] per head: a' [B, S, H·D] -> a [B, S, H·d]."""
    (b, s), g, d, size = a.shape[:2], shape.kv_heads, shape.head_dim, shape.head_dim + noise
    grouped = torch.empty(b, g, s, shape.heads // g, size)
    grouped.copy_(a.view(b, s, g, -1, size).transpose(1, 2))
    true = grouped.flatten(2, 3) @ keys.v_inverse[..., :d]  # [B, G, S·(H/G), d]
    out = torch.empty(b, s, shape.heads * d, dtype=a.dtype)
    out.view(b, s, g, -1, d).copy_(true.view(b, g, s, -1, d).transpose(1, 2))
    return out


def cover(rows: Tensor, pads: Tensor, widths: Sequence[int], stream: SecretStream) -> None:
    """What stood at a pad must not show that it is padding, nor be worth anything: random rows of the others' level.

    Args:
        rows: q' ‖ k' ‖ v' [B, S, W'], changed in place.
        pads: bool [B, S].
        widths: of q', k' and v'.
        stream: where the random rows come from.
    """
    for row in pads.any(1).nonzero().flatten().tolist():
        where = pads[row]
        like = rows[row, ~where] if not bool(where.all()) else rows[~pads]
        random = stream.noise(int(where.sum()), rows.shape[-1]).split(widths, -1)
        covered = [part * _level(of) for part, of in zip(random, like.split(widths, -1), strict=True)]
        rows[row, where] = torch.cat(covered, -1).to(rows.dtype)


def _level(rows: Tensor) -> float:
    """The standard deviation of what is finite; 1 where nothing is."""
    finite = rows[rows.isfinite()].double()
    return float(finite.std()) if finite.numel() > 1 else 1.0
