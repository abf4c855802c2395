from __future__ import annotations

import torch

from cloven.demo.exposed_only import exposed_model
from cloven.zoo.demo import demo_model_path
from cloven.zoo.text import perplexity, sample_text
from tests.split_models import PRECISIONS, demo_bundle, demo_model, relative_error, tiny, tiny_bundle, tiny_folder


def test_the_attackers_gifts_are_in_place() -> None:
    model = exposed_model(demo_model_path(), demo_bundle(), knows_scramble=False)
    assert torch.equal(model.model.embed_tokens.weight, demo_model().model.embed_tokens.weight)
    assert torch.equal(model.model.norm.weight, demo_model().model.norm.weight)


def test_each_half_alone_is_worth_little() -> None:
    text = sample_text(demo_model(), 2, 96)
    original = perplexity(demo_model(), text)
    unscrambled, scrambled = (
        perplexity(exposed_model(demo_model_path(), demo_bundle(), knows_scramble=knows), text) for knows in (True, False)
    )
    assert 3 * original < unscrambled < scrambled


def test_unscrambled_matrices_are_the_originals_less_the_secret_part() -> None:
    for precision in PRECISIONS:
        bundle, plain = tiny_bundle("gpt2", precision), tiny("gpt2")  # Conv1D: the transposed case
        model = exposed_model(tiny_folder("gpt2"), bundle, knows_scramble=True)
        name = "transformer.h.0.mlp.c_fc"
        missing = plain.get_submodule(name).weight.detach() - model.get_submodule(name).weight.detach()
        values = torch.linalg.svdvals(missing)
        rank = bundle.manifest.summary["kinds"]["c_fc"]["secret_parameters"] // 2 // (48 + 192)
        assert float(values[rank + 2]) < 0.05 * float(torch.linalg.matrix_norm(missing, 2)) or rank == 0
        assert model.get_submodule(name).weight.shape == (48, 192)


def test_scrambled_matrices_have_nothing_in_place() -> None:
    bundle = demo_bundle()
    seen = exposed_model(demo_model_path(), bundle, knows_scramble=False)
    for name in ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.o_proj", "lm_head"):
        true, guess = (m.get_submodule(name).weight.detach().double() for m in (demo_model(), seen))
        correlation = float((true * guess).sum() / (true.norm() * guess.norm()))
        assert abs(correlation) < 0.05
        assert relative_error(guess, true) > 0.9
