from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cloven.audit.exposed_only import exposed_model, exposed_only
from cloven.bundle.exposed_copy import ExposedCopy
from cloven.errors import BadInput, TamperedBundle
from cloven.slip.layer import SplitLinear
from cloven.zoo.text import perplexity, sample_text
from tests.split_models import (
    PRECISIONS,
    attached,
    copied,
    demo_bundle,
    demo_model,
    load,
    logits,
    random_ids,
    relative_error,
    tiny,
    tiny_bundle,
)


def matrix(model: PreTrainedModel, name: str) -> Tensor:
    """The [N, K] that a split linear computes with."""
    linear = model.get_submodule(name)
    assert isinstance(linear, SplitLinear)
    columns: Tensor = linear(torch.eye(linear.in_features))
    return (columns if linear.bias is None else columns - linear.bias).t()


def test_the_attackers_gifts_are_in_place() -> None:
    model = exposed_model(demo_bundle(), knows_scramble=False)
    assert torch.equal(model.model.embed_tokens.weight, demo_model().model.embed_tokens.weight)
    assert torch.equal(model.model.norm.weight, demo_model().model.norm.weight)
    for linear in (module for module in model.modules() if isinstance(module, SplitLinear)):
        assert linear.secret_a.numel() == linear.secret_b.numel() == 0  # and nothing else
        assert bool((linear.row_scale >= 0).all()) and linear.row_scale.shape[0] == 1


def test_each_half_alone_is_worth_little() -> None:
    text = sample_text(demo_model(), 2, 96)
    original = perplexity(demo_model(), text)
    unscrambled, scrambled = (perplexity(exposed_model(demo_bundle(), knows_scramble=knows), text) for knows in (True, False))
    assert 3 * original < unscrambled < scrambled


@pytest.mark.parametrize("precision", PRECISIONS)
def test_unscrambled_matrices_are_the_originals_less_the_secret_part(precision: str) -> None:
    bundle, plain, name = tiny_bundle("gpt2", precision), tiny("gpt2"), "transformer.h.0.mlp.c_fc"
    model = exposed_model(bundle, knows_scramble=True)
    weight = plain.get_submodule(name).weight.detach().t()  # Conv1D
    secret = load(bundle.trusted).get_submodule(name)
    rebuilt = matrix(model, name) + secret.secret_b @ secret.secret_a
    assert relative_error(rebuilt, weight) < (0.01 if precision == "int8" else 1e-4)
    assert secret.secret_a.shape[0] == 0 or relative_error(matrix(model, name), weight) > 0.1


def test_scrambled_matrices_have_nothing_in_place() -> None:
    seen = exposed_model(demo_bundle(), knows_scramble=False)
    for name in ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.o_proj", "lm_head"):
        true, guess = demo_model().get_submodule(name).weight.detach().double(), matrix(seen, name).double()
        correlation = float((true * guess).sum() / (true.norm() * guess.norm()))
        assert abs(correlation) < 0.05
        assert relative_error(guess, true) > 0.9


def test_the_split_model_goes_on_as_it_was() -> None:
    """Nothing of it is changed, and what is not split is shared, not copied; the twins ask no worker."""
    bundle, ids = tiny_bundle("llama"), random_ids(97, 1, 9)
    with attached(bundle) as (model, session):
        before = logits(model, ids)
        twins = [exposed_only(model, ExposedCopy(bundle.exposed, bundle.manifest), knows_scramble=knows) for knows in (False, True)]
        session.telemetry.reset()
        for twin in twins:
            assert not torch.allclose(logits(twin, ids), before, atol=0.01)
        assert session.telemetry.total().exchanges == 0
        assert torch.equal(logits(model, ids).argmax(-1), before.argmax(-1)) and torch.allclose(logits(model, ids), before, atol=1e-4)
        held = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
        own = [p for twin in twins for p in twin.parameters() if p.numel() and p.data_ptr() not in held]
        assert all(parameter.dim() < 2 or parameter.shape[0] == 1 for parameter in own)


def test_what_is_refused(tmp_path: Path) -> None:
    bundle = copied(tiny_bundle("llama"), tmp_path / "out")
    with pytest.raises(BadInput, match="not split by SLIP"):
        exposed_only(tiny("llama"), ExposedCopy(bundle.exposed, bundle.manifest), knows_scramble=True)
    shard = bundle.exposed / "exposed-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(TamperedBundle, match="bytes differ"):
        exposed_model(bundle, knows_scramble=False)
