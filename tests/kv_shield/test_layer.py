"""The model in front of an enclave computes what the plain model computes, and its cache holds something else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import QuantizedCache

import cloven
from cloven.errors import BadInput, NotAttached
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.model.cache_argument import cache_of, with_cache
from cloven.zoo.tiny import tiny_config, tiny_model
from tests.kv_bundles import (
    FAMILIES,
    FLOAT32_TOLERANCE,
    MODES,
    Attached,
    attached,
    deviation,
    enclave,
    ids_of,
    kv_bundle,
    load,
    padded,
    stored_keys,
)
from tests.split_models import logits, tiny

# Relative to the largest logit. Measured over the ten families and 4 seeds of the weights: at most 0.017 (permute) and 0.025 (session); the
# distance to float32 grows by a factor of at most 1.06 (permute) and 1.27 (session).
BFLOAT16_TOLERANCE, BFLOAT16_GROWTH = {"permute": 0.03, "session": 0.05}, {"permute": 1.2, "session": 1.6}
BOTH = [(family, mode) for family in FAMILIES for mode in MODES]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=BOTH, ids="-".join)
def a(request: pytest.FixtureRequest) -> Iterator[Attached]:
    with attached(*request.param) as found:
        yield found


def same(a: Attached, ids: Tensor, mask: Tensor | None = None, tolerance: float = FLOAT32_TOLERANCE) -> None:
    more = {} if mask is None else {"attention_mask": mask}
    expected, ours = logits(a.plain, ids, **more), logits(a.model, ids, **more)
    if mask is not None:
        expected, ours = expected[mask.bool()], ours[mask.bool()]
    assert deviation(ours, expected) < tolerance


def test_prefill(a: Attached) -> None:
    same(a, ids_of(1, 1))
    same(a, ids_of(3, 7))
    same(a, ids_of(1, 40, 1))  # past the sliding window


def test_left_padded_batches(a: Attached) -> None:
    same(a, *padded(3, 11, (4, 0, 9)))


def test_right_padded_batches(a: Attached) -> None:
    ids, mask = padded(2, 9, (3, 0))
    same(a, ids.flip(1), mask.flip(1))


def test_cached_decode_token_by_token(a: Attached) -> None:
    ids, mask = padded(2, 20, (4, 0))
    caches: dict[str, Any] = {}
    for name, model in (("plain", a.plain), ("keyed", a.model)):
        steps = []
        with torch.no_grad():
            out = model(
                input_ids=ids[:, :6], attention_mask=mask[:, :6], position_ids=(mask[:, :6].cumsum(1) - 1).clamp_min(0), use_cache=True
            )
            for t in range(6, 20):  # past the window of 8
                position = mask[:, : t + 1].sum(1, keepdim=True) - 1
                out = model(
                    input_ids=ids[:, t : t + 1],
                    attention_mask=mask[:, : t + 1],
                    position_ids=position,
                    **with_cache(cache_of(out)),
                    use_cache=True,
                )
                steps.append(out.logits[:, -1])
        caches[name] = torch.stack(steps)
    assert deviation(caches["keyed"], caches["plain"]) < FLOAT32_TOLERANCE


def test_chunks_of_several_tokens(a: Attached) -> None:
    ids, out = ids_of(2, 24, 3), None
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 16), (16, 24)):
            out = a.model(input_ids=ids[:, start:end], **with_cache(cache_of(out) if out else None), use_cache=True)
            assert deviation(out.logits, logits(a.plain, ids[:, :end])[:, start:]) < FLOAT32_TOLERANCE


def test_generate(a: Attached) -> None:
    ids, mask = padded(2, 9, (3, 0), seed=2)
    options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 14, "output_scores": True, "return_dict_in_generate": True}
    expected, ours = a.plain.generate(ids, **options), a.model.generate(ids, **options)
    assert torch.equal(ours.sequences, expected.sequences)
    assert deviation(torch.stack(ours.scores), torch.stack(expected.scores)) < FLOAT32_TOLERANCE


def test_without_a_cache(a: Attached) -> None:
    ids = ids_of(2, 6, 4)
    for _ in range(2):
        assert deviation(logits(a.model, ids, use_cache=False), logits(a.plain, ids, use_cache=False)) < FLOAT32_TOLERANCE


def test_the_sliding_window_is_real() -> None:
    """A plain model without its window differs: the tests above would notice one that is lost."""
    narrow, wide = tiny_model("mistral"), tiny_model("mistral")
    for module in wide.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = None
    wide.config.sliding_window = None
    ids = ids_of(1, 30)
    assert deviation(logits(wide, ids), logits(narrow, ids)) > 0.01


def test_eager_attention() -> None:
    for mode in MODES:
        with enclave(kv_bundle("qwen3", mode) / "trusted") as (address, _):
            model = load(kv_bundle("qwen3", mode), attn_implementation="eager")
            with cloven.attach(model, address, timeout=10):
                ids, mask = padded(2, 9, (3, 0))
                expected = logits(tiny_model("qwen3"), ids, attention_mask=mask)
                assert deviation(logits(model, ids, attention_mask=mask)[mask.bool()], expected[mask.bool()]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize(("family", "mode"), BOTH)
def test_bfloat16(family: str, mode: str) -> None:
    """Within the stated tolerance of the plain bfloat16 model, and about as far from float32 as that is."""
    plain, exact = tiny_model(family).to(torch.bfloat16), tiny(family)
    with enclave(kv_bundle(family, mode) / "trusted") as (address, _):
        model = load(kv_bundle(family, mode), torch.bfloat16)
        with cloven.attach(model, address, timeout=10):
            ids = ids_of(2, 20, 5)
            ours, theirs, true = logits(model, ids), logits(plain, ids), logits(exact, ids)
    assert ours.dtype == torch.bfloat16
    assert deviation(ours, theirs) < BFLOAT16_TOLERANCE[mode]
    rms = [float((y.float() - true).pow(2).mean().sqrt()) for y in (ours, theirs)]
    assert rms[0] < BFLOAT16_GROWTH[mode] * rms[1]


VARIANTS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "sliding and full layers": (
        "qwen2",
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        torch.float32,
    ),
    "biases": ("llama", {"attention_bias": True}, torch.float32),
    "one kv head": ("qwen3", {"num_key_value_heads": 1}, torch.float32),
    "heads wider than the hidden size": ("gemma", {"head_dim": 32}, torch.float32),
    "prepared in bfloat16": ("qwen3", {}, torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path: Path, name: str, mode: str) -> None:
    family, settings, dtype = VARIANTS[name]
    config = tiny_config(family)
    config.update(settings)
    torch.manual_seed(4)
    plain: Any = type(tiny(family))(config).eval().to(dtype)
    prepare_kv_shield(copy.deepcopy(plain), tmp_path / "out", KvShieldConfig(mode))
    with enclave(tmp_path / "out" / "trusted") as (address, _):
        model = load(tmp_path / "out", dtype)
        with cloven.attach(model, address, timeout=10):
            ids, mask = padded(2, 12, (3, 0))
            options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 8, "output_scores": True, "return_dict_in_generate": True}
            expected, ours = plain.generate(ids, **options), model.generate(ids, **options)
            tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE[mode]
            assert deviation(ours.scores[0], expected.scores[0]) < tolerance
            if dtype == torch.float32:
                assert torch.equal(ours.sequences, expected.sequences)
                assert deviation(torch.stack(ours.scores), torch.stack(expected.scores)) < tolerance


# --- what the cache holds


def layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def caches(a: Attached, ids: Tensor, **more: Any) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]], Any]:
    """The plain model's cache, the keyed one, and what must live as long as the latter's session."""
    with torch.no_grad():
        plain, keyed = (cache_of(model(input_ids=ids, use_cache=True, **more)) for model in (a.plain, a.model))
    return layers_of(plain), layers_of(keyed), keyed


def test_the_cache_is_keyed(a: Attached) -> None:
    ids, mask = padded(2, 7, (2, 0))
    plain, keyed, kept = caches(a, ids, attention_mask=mask)
    assert kept is not None and len(plain) == len(keyed) == 2
    for index, (true, held) in enumerate(zip(plain, keyed, strict=True)):
        for which, (x, y) in enumerate(zip(true, held, strict=True)):  # [B, G, S, d] and [B, G, S, D]
            d = x.shape[-1]
            if a.mode == "permute":
                pi = stored_keys(a.family)[f"{index}.{'qk' if which == 0 else 'v'}"]
                expected = torch.gather(x, 3, pi[None, :, None].expand_as(x))
                real = mask[:, None, :, None].bool().expand_as(x)
                assert deviation(y[real], expected[real]) < 1e-5
                assert deviation(y[real], x[real]) > 0.1
                continue
            assert y.shape[-1] == d + 16
            keys = a.keys(index)
            for row in range(2):
                key = keys[row]
                inverse, matrix = (key.k_inverse, key.k) if which == 0 else (key.v_inverse, key.v)
                real = mask[row].bool()
                opened = torch.einsum("gsi,gij->gsj", y[row], inverse)
                assert deviation(opened[:, real, :d], x[row][:, real]) < 1e-4
                expected = torch.einsum("gsi,gij->gsj", torch.cat([x[row], opened[..., d:]], -1), matrix)
                assert deviation(y[row][:, real], expected[:, real]) < 1e-4
                assert deviation(y[row][:, real, :d], x[row][:, real]) > 0.1
                if row == 0:  # pads: not even the enclave finds them
                    assert deviation(opened[:, ~real, :d], x[row][:, ~real]) > 0.3
            other = torch.einsum("gsi,gij->gsj", y[0], keys[1].k_inverse if which == 0 else keys[1].v_inverse)
            assert deviation(other[:, mask[0].bool(), :d], x[0][:, mask[0].bool()]) > 0.3


def test_decoded_rows_are_keyed_too(a: Attached) -> None:
    ids = ids_of(1, 9, 6)
    with torch.no_grad():
        plain, keyed = (cache_of(model(input_ids=ids[:, :6], use_cache=True)) for model in (a.plain, a.model))
        for t in range(6, 9):
            for model, cache in ((a.plain, plain), (a.model, keyed)):
                model(input_ids=ids[:, t : t + 1], **with_cache(cache), use_cache=True)
    for true, held in zip(layers_of(plain), layers_of(keyed), strict=True):
        for x, y in zip(true, held, strict=True):
            assert x.shape[2] == y.shape[2]
            assert all(deviation(y[:, :, -n, : x.shape[-1]], x[:, :, -n]) > 0.1 for n in (1, 2, 3))
            if a.mode == "permute":
                assert torch.allclose(y.sort(-1).values, x.sort(-1).values, atol=1e-4)  # the published scheme's weakness
            else:
                assert not torch.allclose(y.sort(-1).values[..., : x.shape[-1]], x.sort(-1).values, atol=0.1)


def test_equal_tokens_look_different_in_session_mode(a: Attached) -> None:
    if a.mode == "permute":
        pytest.skip("a permutation is the same for every token")
    _, keyed, _ = caches(a, torch.full((2, 5), 7))
    values = keyed[0][1]  # layer 0: the plain rows are all equal
    rows = values.transpose(1, 2).flatten(2).flatten(0, 1)
    assert all(deviation(rows[i], rows[j]) > 0.1 for i in range(len(rows)) for j in range(i))


def test_the_softmax_keeps_its_scale(a: Attached) -> None:
    for name, plain in a.plain.named_modules():
        if hasattr(plain, "scaling"):
            assert a.model.get_submodule(name).scaling == plain.scaling


# --- other caches


def test_a_static_cache_in_permute_mode() -> None:
    for family in ("llama", "mistral"):
        with attached(family, "permute") as a:
            ids = ids_of(1, 6)
            options = {**GREEDY, "max_new_tokens": 12}
            assert torch.equal(a.model.generate(ids, cache_implementation="static", **options), a.plain.generate(ids, **options))


@pytest.mark.parametrize("family", ["llama", "glm", "gpt2"])
def test_a_quantised_cache_in_permute_mode(family: str) -> None:
    """One scale for a tensor (fp8): codes are permuted like the values."""
    with attached(family, "permute") as a:
        out: dict[str, Any] = {}
        ids = ids_of(1, 12, 8)
        with torch.no_grad():
            for name, model in (("plain", a.plain), ("keyed", a.model)):
                cache = QuantizedCache("fp8", model.config)
                model(input_ids=ids[:, :8], **with_cache(cache), use_cache=True)
                out[name] = model(input_ids=ids[:, 8:], **with_cache(cache), use_cache=True).logits
        exact = logits(a.plain, ids)[:, 8:]
        assert deviation(out["plain"], exact) > 1e-3  # it does round
        assert deviation(out["keyed"], out["plain"]) < 0.2 * deviation(out["plain"], exact)


# --- models that somebody changes


class Adapter(nn.Module):
    """As PEFT does it: stands in the place of a linear, calls it and adds to it."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_an_adapter_on_top_is_refused(family: str, mode: str) -> None:
    """It would add plain rows to keyed ones, or keyed rows to plain ones: wrong numbers, and no error."""
    with attached(family, mode) as a:
        shape = a.enclave.manifest.layers[0]
        attention = a.model.get_submodule(shape.name)
        for name in (*shape.projections, shape.output):
            linear = attention.get_submodule(name)
            setattr(attention, name, Adapter(linear))
            with pytest.raises(BadInput, match=rf"{shape.name}: its {name} is not the module .* merge adapters before `prepare`"):
                logits(a.model, ids_of(1, 5))
            setattr(attention, name, linear)
        same(a, ids_of(1, 5))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("mode", MODES)
def test_peft(mode: str) -> None:
    """Refused where it touches the attention's projections; elsewhere it is none of KV-Shield's business."""
    peft: Any = pytest.importorskip("peft")
    with attached("llama", mode) as a:
        on_top = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with pytest.raises(BadInput, match="merge adapters before `prepare`"):
            logits(peft.get_peft_model(a.model, on_top), ids_of(1, 5))
    with attached("llama", mode) as a:
        elsewhere = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)
        outputs = []
        for model in (copy.deepcopy(a.plain), a.model):
            torch.manual_seed(1)
            outputs.append(logits(peft.get_peft_model(model, elsewhere), ids_of(1, 5)))
        assert deviation(outputs[1], outputs[0]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt2"])
def test_a_copy_of_the_model_starts_without_a_session(family: str, mode: str) -> None:
    with attached(family, mode) as a:
        same(a, ids_of(1, 5))
        clone = copy.deepcopy(a.model)
        a.session._call.mask = mark = torch.ones(1, 1)
        with pytest.raises(NotAttached):
            logits(clone, ids_of(1, 3))
        assert a.session._call.mask is mark  # it does not hear of it
        same(a, ids_of(1, 6))
        with cloven.attach(clone, str(a.session.channel.address), timeout=10):
            with torch.no_grad():
                for parameter in a.model.parameters():
                    parameter.zero_()  # the copy has weights, and hooks, of its own
            a.session.close()
            assert deviation(logits(clone, ids_of(2, 5)), logits(a.plain, ids_of(2, 5))) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_not_attached(mode: str) -> None:
    model = load(kv_bundle("llama", mode))
    with pytest.raises(NotAttached, match="CLOVEN_ENCLAVE"):
        logits(model, ids_of(1, 3))
