"""Rotation on permuted vectors, against the family's own code; and the two published equations without the correction."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cloven.errors import UnsupportedModel
from cloven.kv_shield.prepare import attention_shapes, learn_rotary
from cloven.kv_shield.rotary import Rotary
from cloven.model.attention import rotary_module, rotation_function
from cloven.zoo.tiny import tiny_model
from tests.kv_bundles import FAMILIES, deviation, half_split, random_rows
from tests.split_models import tiny

ROTATED = tuple(family for family in FAMILIES if family != "gpt2")


@functools.cache
def learnt(family: str) -> Rotary:
    rotary = learn_rotary(tiny(family), attention_shapes(tiny(family)))
    assert rotary is not None
    return rotary


def rotated(rotary: Rotary, x: Tensor, positions: Tensor, pi: Tensor) -> Tensor:
    """x [B, S, H·d], one permutation [H, d] per head."""
    gather = rotary.gather(pi)
    return gather.rotate(x, gather.columns(rotary.tables(positions, x.dtype)))


def by_the_family(family: str, x: Tensor, positions: Tensor) -> Tensor:
    """x [B, S, H, d] rotated by transformers."""
    model = tiny(family)
    rotary: Any = rotary_module(model)
    shape = attention_shapes(model)[0]
    cos, sin = rotary(x, positions)
    q = x.transpose(1, 2)
    return rotation_function(model.get_submodule(shape.name))(q, q, cos, sin)[0].transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ROTATED)
def test_bit_for_bit_on_permuted_vectors(family: str, dtype: torch.dtype) -> None:
    heads, d = 3, attention_shapes(tiny(family))[0].head_dim
    x, positions = random_rows(2, 5, heads, d, dtype=dtype), torch.tensor([[0, 1, 2, 3, 4], [7, 9, 60, 127, 3]], dtype=torch.int32)
    expected = by_the_family(family, x, positions.long())
    pi = torch.stack([torch.randperm(d) for _ in range(heads)])
    index = pi.expand(2, 5, heads, d)
    ours = rotated(learnt(family), torch.gather(x, 3, index).flatten(2), positions, pi).unflatten(2, (heads, d))
    assert ours.dtype == dtype
    assert torch.equal(ours, torch.gather(expected, 3, index))


def test_gpt2_has_no_rotation() -> None:
    assert learn_rotary(tiny("gpt2"), attention_shapes(tiny("gpt2"))) is None


def test_glm_rotates_half_of_every_head_interleaved() -> None:
    rotary = learnt("glm")
    assert rotary.partner.tolist() == [1, 0, 3, 2, 5, 4, 6, 7, 8, 9, 10, 11]
    assert rotary.sign.tolist() == [-1, 1] * 3 + [0] * 6
    assert rotary.frequency.tolist() == [0, 0, 1, 1, 2, 2] + [3] * 6


def test_llama_rotates_halves() -> None:
    rotary, other = learnt("llama"), half_split(12)
    assert (rotary.partner.tolist(), rotary.sign.tolist()) == (other.partner.tolist(), other.sign.tolist())
    assert rotary.frequency.tolist() == [*range(6), *range(6)]


@given(st.sampled_from([2, 4, 12]), st.integers(1, 3), st.integers(0, 10_000), st.integers(0, 2**31))
def test_it_commutes_with_any_permutation(rotated_dims: int, heads: int, position: int, seed: int) -> None:
    rotary, generator = half_split(12, rotated_dims), torch.Generator().manual_seed(seed)
    pi = torch.stack([torch.randperm(12, generator=generator) for _ in range(heads)])
    x = torch.randn(1, 1, heads, 12, generator=generator)
    positions = torch.tensor([[position]], dtype=torch.int32)
    plain = rotated(rotary, x.flatten(2), positions, torch.arange(12).expand(heads, 12)).unflatten(2, (heads, 12))
    permuted = rotated(rotary, torch.gather(x, 3, pi[None, None]).flatten(2), positions, pi).unflatten(2, (heads, 12))
    assert torch.equal(permuted, torch.gather(plain, 3, pi[None, None]))
    assert torch.equal(plain[..., rotated_dims:], x[..., rotated_dims:])
    assert torch.allclose(plain.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_position_zero_is_the_identity() -> None:
    x = random_rows(1, 1, 12)
    assert torch.equal(rotated(half_split(), x, torch.zeros(1, 1), torch.arange(12)[None]), x)


def test_scaling() -> None:
    plain = half_split(12, 6)
    scaled = Rotary(plain.inverse_frequencies, 2.0, plain.frequency, plain.partner, plain.sign)
    x, positions, pi = random_rows(1, 4, 12), torch.arange(4)[None], torch.arange(12)[None]
    a, b = rotated(plain, x, positions, pi), rotated(scaled, x, positions, pi)
    assert torch.allclose(b[..., :6], 2 * a[..., :6]) and torch.equal(b[..., 6:], x[..., 6:])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[H, S, d] each, causal -> [S, H·d]."""
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    mask = torch.full(scores.shape[1:], -torch.inf).triu(1)
    return (torch.softmax(scores + mask, -1) @ v).transpose(0, 1).flatten(1)


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def test_as_published_one_permutation_across_all_heads_is_wrong() -> None:
    """Equations (2) to (6) with a permutation of all H·d outputs: heads mix. One per head: exact. No rotation here."""
    h, s, d = 4, 16, 12
    q, k, v = random_rows(3, s, h * d)
    expected = attention(*(heads_of(x, h) for x in (q, k, v)))
    across = torch.randperm(h * d, generator=torch.Generator().manual_seed(1))
    per_head = torch.cat([torch.randperm(d) + d * head for head in range(h)])
    errors = {}
    for name, pi in (("across", across), ("per head", per_head)):
        keyed = attention(*(heads_of(x[:, pi], h) for x in (q, k, v)))
        errors[name] = deviation(keyed[:, pi.argsort()], expected)
    assert errors["across"] > 0.2
    assert errors["per head"] < 1e-6


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_as_published_permuting_before_rope_is_wrong(family: str) -> None:
    """Even per head: the accelerator's own rotation pairs the wrong dimensions. The enclave's signed gather: exact."""
    h, s, d = 4, 16, 12
    q, k, v = random_rows(3, s, h * d)
    positions, pi = torch.arange(s)[None], torch.stack([torch.randperm(d, generator=torch.Generator().manual_seed(2))] * h)
    flat, identity = (pi + d * torch.arange(h)[:, None]).flatten(), torch.arange(d).expand(h, d)

    def attended(q: Tensor, k: Tensor, v: Tensor, order: Tensor) -> Tensor:
        qk = (rotated(learnt(family), x[None], positions, order)[0] for x in (q, k))
        return attention(*(heads_of(x, h) for x in (*qk, v)))

    expected = attended(q, k, v, identity)
    permuted = [x[:, flat] for x in (q, k, v)]
    assert deviation(attended(*permuted, identity)[:, flat.argsort()], expected) > 0.1
    assert deviation(attended(*permuted, pi)[:, flat.argsort()], expected) < 1e-6


def test_a_rotation_that_is_no_gather_is_refused() -> None:
    model: Any = tiny_model("llama")
    mix = torch.linalg.qr(random_rows(12, 12))[0]
    module, own = model.get_submodule(attention_shapes(model)[0].name), rotation_function(model.model.layers[0].self_attn)
    namespace = __import__("sys").modules[type(module).__module__]

    def mixed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x @ mix for x in own(q, k, cos, sin))  # type: ignore[return-value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(namespace, "apply_rotary_pos_emb", mixed)
        with pytest.raises(UnsupportedModel, match="llama"):
            learn_rotary(model, attention_shapes(model))
