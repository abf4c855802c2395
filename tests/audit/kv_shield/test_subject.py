"""What is attacked: rows of every mode, and the table of layer 0."""

from __future__ import annotations

import pytest
import torch

from cloven.audit.kv_shield.subject import MODES, layer0_of, open_subject, snapshot
from cloven.model.cache_argument import with_cache
from tests.audit.kv_shield.subjects import HEADS, NOISE, D, generator, table, text
from tests.split_models import tiny


@pytest.mark.parametrize("mode", MODES)
def test_snapshots_are_what_a_cache_of_the_mode_holds(mode: str) -> None:
    rows = table()[text()]
    seen, again = snapshot(mode, rows, NOISE), snapshot(mode, rows, NOISE)
    assert seen.shape == (*rows.shape[:2], D + NOISE if mode == "session" else D)
    assert torch.equal(seen, rows) == (mode == "none")
    assert torch.equal(seen, again) == (mode == "none")  # fresh keys every time
    if mode in ("none", "permute"):
        assert torch.equal(seen.sort(-1).values, rows.sort(-1).values)
    if mode == "session":  # plain rows are in the span, without their noise they are not all of it
        for head in range(HEADS):
            both = torch.linalg.matrix_rank(torch.cat([seen[:, head], rows[:, head]], 1).double(), rtol=1e-5)
            assert int(both) == D + NOISE
    if mode == "sealed":
        assert float(seen.abs().max()) <= 1 and abs(float(seen.mean())) < 0.1 and abs(float(seen.std()) - 3**-0.5) < 0.05


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt2"])
def test_layer_0_depends_on_the_token_alone(family: str) -> None:
    """The table is what layer 0 makes of a text, whatever stands around: but for GPT-2, whose positions are added before."""
    from transformers import DynamicCache

    model = tiny(family)
    layer = layer0_of(model)
    ids = torch.randint(1, 97, (1, 10), generator=generator(2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **with_cache(cache))
    rows = cache.layers[0].values[0].transpose(0, 1)
    assert layer.table.shape == (97, layer.shape.kv_heads, layer.shape.head_dim)
    expected = layer.table[ids[0]]
    assert torch.allclose(expected[:1], rows[:1], atol=1e-4) and torch.allclose(expected, rows, atol=1e-4) == (family != "gpt2")
    assert layer.weight.shape == (layer.shape.widths()[2], 48)


def test_every_mode_of_one_text() -> None:
    tokens = torch.tensor([3, 5, 3, 3, 9] * 20)
    found = open_subject(tiny("llama"), tokens, NOISE)
    assert tuple(found.caches) == MODES and found.noise == NOISE and found.chance == 0.6
    assert torch.equal(found.caches["none"], found.layer.table[tokens])
    assert found.second.shape == found.caches["session"].shape and not torch.equal(found.second, found.caches["session"])


def test_keys_follow_from_the_seed() -> None:
    text = torch.randint(1, 40, (80,), generator=torch.Generator().manual_seed(0))
    first, again, other = (open_subject(tiny("llama"), text, NOISE, seed) for seed in (1, 1, 2))
    for mode in ("permute", "session"):
        assert torch.equal(first.caches[mode], again.caches[mode]) and not torch.equal(first.caches[mode], other.caches[mode])
    assert torch.equal(first.second, again.second) and not torch.equal(first.second, first.caches["session"])
