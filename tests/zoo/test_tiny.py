from __future__ import annotations

import pytest
import torch

from cloven.zoo.tiny import FAMILIES, tiny_config, tiny_model
from tests.split_models import logits, random_ids, tiny

IDS = random_ids(97, 1, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_small_and_its_logits_are_not_all_alike(family: str) -> None:
    model = tiny(family)
    assert model.num_parameters() < 200_000 and model.dtype == torch.float32 and not model.training
    result = logits(model, IDS)
    assert result.shape == (1, 6, 97) and bool(torch.isfinite(result).all())
    assert float(result.std()) > 0.5 and len(result.argmax(-1).unique()) > 1


def test_the_seed_decides() -> None:
    assert torch.equal(logits(tiny_model("llama", 0), IDS), logits(tiny("llama"), IDS))
    assert not torch.equal(logits(tiny_model("llama", 1), IDS), logits(tiny("llama"), IDS))


def test_what_is_tied_is_tied() -> None:
    tied = tiny("llama-tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tiny("llama").lm_head.weight is not tiny("llama").model.embed_tokens.weight


def test_configurations_beyond_the_families() -> None:
    assert tiny_config("mixtral").num_local_experts == 4
    with pytest.raises(KeyError):
        tiny_config("no-such-family")
