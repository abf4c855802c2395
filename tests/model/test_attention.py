from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cloven.errors import UnsupportedModel
from cloven.model.attention import (
    attention_modules,
    head_counts,
    output_of,
    projections_of,
    rotary_module,
    rotation_function,
    rotation_matrices,
)
from cloven.zoo.tiny import tiny_model
from tests.kv_bundles import FAMILIES
from tests.split_models import tiny

NAMES = {"gpt2": ["transformer.h.0.attn", "transformer.h.1.attn"]}
PROJECTIONS = {"gpt2": ("c_attn",), "phi3": ("qkv_proj",)}
POSITIONS = torch.tensor([0, 1, 2, 5, 100])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_modules(family: str) -> None:
    found = attention_modules(tiny(family))
    assert list(found) == NAMES.get(family, ["model.layers.0.self_attn", "model.layers.1.self_attn"])
    for attention in found.values():
        assert projections_of(attention) == PROJECTIONS.get(family, ("q_proj", "k_proj", "v_proj"))
        assert output_of(attention) == ("c_proj" if family == "gpt2" else "o_proj")


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", (4, 2, 12)), ("llama-mha", (4, 4, 12)), ("gpt2", (4, 4, 12)), ("phi3", (4, 2, 12))]
)
def test_head_counts(family: str, expected: tuple[int, int, int]) -> None:
    model = tiny(family)
    assert all(head_counts(attention, model.config) == expected for attention in attention_modules(model).values())


def test_no_attention() -> None:
    model: Any = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Identity()
    with pytest.raises(UnsupportedModel, match="llama: has no attention layer"):
        attention_modules(model)
    assert projections_of(nn.Linear(3, 3)) == () and output_of(nn.Linear(3, 3)) == ""


def test_mlps_are_no_attention() -> None:
    assert projections_of(tiny("gpt2").get_submodule("transformer.h.0.mlp")) == ()  # has a c_proj
    assert projections_of(tiny("llama").get_submodule("model.layers.0.mlp")) == ()


def test_rotary_modules() -> None:
    assert rotary_module(tiny("gpt2")) is None
    assert rotary_module(tiny("llama")) is tiny("llama").get_submodule("model.rotary_emb")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change(kind: str) -> None:
    model: Any = tiny_model("llama")
    model.model.rotary_emb.rope_type = kind
    with pytest.raises(UnsupportedModel, match=f"llama: its rotary embedding .{kind}"):
        rotary_module(model)


def test_several_rotary_modules() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[0].rotary_emb = nn.Identity()
    with pytest.raises(UnsupportedModel):
        rotary_module(model)


def test_a_rotary_module_without_frequencies() -> None:
    model: Any = tiny_model("llama")
    model.model.rotary_emb = nn.Identity()
    with pytest.raises(UnsupportedModel):
        rotary_module(model)


def test_a_family_without_the_usual_function() -> None:
    with pytest.raises(UnsupportedModel, match="Linear"):
        rotation_function(nn.Linear(2, 2))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_rotation_matrices(family: str) -> None:
    model = tiny(family)
    rotary, attention = rotary_module(model), next(iter(attention_modules(model).values()))
    assert rotary is not None
    d = head_counts(attention, model.config)[2]
    matrices = rotation_matrices(attention, rotary, POSITIONS, d)
    assert matrices.shape == (5, d, d) and matrices.dtype == torch.float32
    assert torch.equal(matrices[0], torch.eye(d))
    assert torch.allclose(matrices @ matrices.transpose(1, 2), torch.eye(d).expand(5, d, d), atol=1e-5)  # a rotation
    assert torch.allclose(matrices[1] @ matrices[1], matrices[2], atol=1e-5)  # of p times an angle
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary(x[None], POSITIONS[None])
    expected = rotation_function(attention)(x[None, None], x[None, None], cos, sin)[0][0, 0]
    assert torch.allclose(torch.einsum("sd,sde->se", x, matrices), expected, atol=1e-5)


def test_only_the_identity_commutes_with_rope() -> None:
    """Why a permutation cannot be applied before the accelerator's own rotation (kv-maths, 3.1): every transposition fails."""
    model = tiny("llama")
    rotary, attention = rotary_module(model), next(iter(attention_modules(model).values()))
    assert rotary is not None
    rotation = rotation_matrices(attention, rotary, torch.tensor([1, 7]), 12)
    for i in range(12):
        for j in range(i):
            swap = torch.eye(12)
            swap[[i, j]] = swap[[j, i]]
            assert float((swap @ rotation - rotation @ swap).abs().max()) > 1e-3
