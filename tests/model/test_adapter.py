"""Reading PEFT's format without PEFT, against PEFT itself."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cloven.errors import BadInput, ClovenError
from cloven.model.adapter import CONFIG, WEIGHTS, Adapter, LoraModule, read_adapter
from cloven.zoo.demo import demo_adapter_path
from tests.lora_bundles import RANK, adapter_folder, peft, peft_adapter, tensors

Q = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{Q}"


def delta(module: LoraModule) -> torch.Tensor:
    """What the adapter adds to a weight [N, K], as cloven reads it."""
    return module.scale * (module.b.double() @ module.a.double())


def peft_deltas(model: Any) -> dict[str, torch.Tensor]:
    """The same by PEFT, as [N, K]."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.get_delta_weight("default").detach().double()
            found[name] = weight.t() if module.fan_in_fan_out else weight
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.0.mlp.down_proj": 2, "v_proj": 7, "h.0.attn.c_attn": 3}},
    "alpha_pattern": {"alpha_pattern": {r".*layers\.1.*": 20, "q_proj": 1, r"h\.\d+\.mlp\.c_fc": 12}},
    "both, rslora": {"rank_pattern": {"o_proj": 9, "c_proj": 6}, "alpha_pattern": {"o_proj": 2, "attn.c_proj": 11}, "use_rslora": True},
    "the first pattern counts": {
        "rank_pattern": {"^model.layers.0.self_attn.v_proj": 5, "layers.0.self_attn.q_proj": 2, "proj": 3, "q_proj": 8}
    },
    "some modules": {"target_modules": ["q_proj", "down_proj", "c_attn"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SETTINGS)
def test_as_peft_does(family: str, name: str, tmp_path: Path) -> None:
    options = {**SETTINGS[name]}
    if family == "gpt2":
        options["fan_in_fan_out"] = True
    model = peft_adapter(tmp_path, family, **options)
    if name == "gaussian start":  # its B is zero
        with torch.no_grad():
            for parameter in (parameter for key, parameter in model.named_parameters() if "lora_B" in key):
                parameter.normal_()
        model.save_pretrained(tmp_path)
    expected, adapter = peft_deltas(model), read_adapter(tmp_path)
    assert [module.name for module in adapter.modules] == sorted(expected)
    for module in adapter.modules:
        assert torch.allclose(delta(module), expected[module.name], rtol=1e-5, atol=1e-7), module
        assert module.a.dtype == module.b.dtype == torch.float32


def test_the_patterns_above_make_a_difference(tmp_path: Path) -> None:
    ranks = {}
    for name in ("plain", "rank_pattern", "the first pattern counts"):
        peft_adapter(tmp_path / name, **SETTINGS[name])
        ranks[name] = {module.name.removeprefix("model.layers."): module.a.shape[0] for module in read_adapter(tmp_path / name).modules}
    assert set(ranks["plain"].values()) == {RANK}
    assert ranks["rank_pattern"]["0.mlp.down_proj"] == 2 and ranks["rank_pattern"]["1.mlp.down_proj"] == RANK
    assert ranks["rank_pattern"]["1.self_attn.v_proj"] == 7
    assert ranks["the first pattern counts"]["0.self_attn.q_proj"] == 2 and ranks["the first pattern counts"]["0.self_attn.v_proj"] == 5


def test_half_precision(tmp_path: Path) -> None:
    shutil.copytree(adapter_folder(), tmp_path / "a")
    for dtype in (torch.float16, torch.bfloat16):
        halves = {name: tensor.to(dtype) for name, tensor in tensors(adapter_folder() / WEIGHTS).items()}
        save_file(halves, tmp_path / "a" / WEIGHTS)
        for module in read_adapter(tmp_path / "a").modules:
            assert torch.equal(module.a, halves[f"base_model.model.{module.name}.lora_A.weight"].float())


def test_the_demo_adapter() -> None:
    adapter = read_adapter(demo_adapter_path())
    assert {module.scale for module in adapter.modules} == {2.0} and {module.a.shape[0] for module in adapter.modules} == {8}
    assert all(bool(module.b.any()) for module in adapter.modules)


# --- the hash


def slow_sha256(adapter: Adapter) -> str:
    digest = hashlib.sha256(b"cloven/adapter/1")
    for module in adapter.modules:
        digest.update(json.dumps([module.name, list(module.a.shape), list(module.b.shape), module.scale]).encode())
        for factor in (module.a, module.b):
            digest.update(b"".join(torch.tensor(value).numpy().tobytes() for value in factor.flatten().tolist()))
    return digest.hexdigest()


def edited(tmp_path: Path, config: dict[str, Any] | None = None, weights: Mapping[str, Any] | None = None) -> Path:
    """An adapter for q_proj only, with fields of its configuration and tensors changed; `...` removes one."""
    folder = tmp_path / "edited"
    folder.mkdir(exist_ok=True)
    record = {**json.loads((adapter_folder() / CONFIG).read_text(encoding="utf-8")), **(config or {})}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in record.items() if value is not ...}), encoding="utf-8")
    source = tensors(adapter_folder() / WEIGHTS)
    kept = {f"{PREFIX}.lora_{part}.weight": source[f"{PREFIX}.lora_{part}.weight"] for part in "AB"} | dict(weights or {})
    save_file({key: value.contiguous() for key, value in kept.items() if value is not ...}, folder / WEIGHTS)
    return folder


def test_the_hash_is_over_names_shapes_bytes_and_scales(tmp_path: Path) -> None:
    adapter = read_adapter(edited(tmp_path))
    assert adapter.sha256 == slow_sha256(adapter) and len(adapter.modules) == 1
    a = tensors(adapter_folder() / WEIGHTS)[f"{PREFIX}.lora_A.weight"]
    one_bit = a.clone()
    one_bit.view(torch.int32)[0, 0] ^= 1
    assert read_adapter(edited(tmp_path)).sha256 == adapter.sha256
    found = set()
    for change in ({"lora_alpha": 9}, {"use_rslora": True}):
        found.add(read_adapter(edited(tmp_path, change)).sha256)
    found.add(read_adapter(edited(tmp_path, weights={f"{PREFIX}.lora_A.weight": one_bit})).sha256)
    renamed = {f"{PREFIX}.lora_{part}.weight": ... for part in "AB"} | {
        f"{PREFIX[:-6]}k_proj.lora_{part}.weight": tensors(adapter_folder() / WEIGHTS)[f"{PREFIX}.lora_{part}.weight"] for part in "AB"
    }
    found.add(read_adapter(edited(tmp_path, weights=renamed)).sha256)
    assert len(found | {adapter.sha256}) == 5


def test_the_hash_ignores_what_does_not_matter(tmp_path: Path) -> None:
    plain = read_adapter(edited(tmp_path)).sha256
    assert read_adapter(edited(tmp_path, {"lora_dropout": 0.5, "base_model_name_or_path": "x", "inference_mode": False})).sha256 == plain


# --- refusals by name


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "use_dora is set: DoRA rescales"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication is set"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' may change the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' may change the base"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "cannot be served"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_peft_saves_and_cannot_be_served(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    if "lora_bias" in settings:
        settings = {**settings, "init_lora_weights": True}
    peft_adapter(tmp_path, **settings)
    with pytest.raises(BadInput, match=match):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"peft_type": ...}, "only LoRA"),
        ({"use_warp": True}, "use_warp is set, and this cloven does not know"),
        ({"kasa_config": {"x": 1}}, "kasa_config is set"),
        ({"lora_ga_config": {"rho": 2}, "megatron_config": {"a": 1}}, "lora_ga_config is set"),
        ({"init_lora_weights": "loftq"}, "'loftq' may change the base"),
        ({"init_lora_weights": "pissa_niter_16"}, "may change the base"),
        ({"r": 5}, f"q_proj has factors .* {CONFIG} says rank 5"),
        ({"r": 0}, "the rank of .*q_proj is 0"),
        ({"r": None}, "the rank of .*q_proj is None"),
        ({"r": True}, "the rank of .*q_proj is True"),
        ({"r": "4"}, "the rank of .*q_proj is '4'"),
        ({"rank_pattern": {"q_proj": 3}}, "says rank 3"),
        ({"rank_pattern": {"q_proj": [4]}}, "the rank of"),
        ({"rank_pattern": {"(": 3}}, "which is no pattern"),
        ({"lora_alpha": -1}, "the alpha of .*q_proj is -1"),
        ({"lora_alpha": math.nan}, "the alpha of"),
        ({"lora_alpha": math.inf}, "the alpha of"),
        ({"alpha_pattern": {"q_proj": None}}, "the alpha of"),
        ({"alpha_pattern": {"*": 3}}, "which is no pattern"),
        ({"rank_pattern": {"(([a-z0-9_.]*)*)*!": 4}}, "repeated groups"),  # would take for ever to match
        ({"rank_pattern": {".*.*.*.*.*q_proj": 4}}, "more than 4 repetitions"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configurations_that_are_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=match):
        read_adapter(edited(tmp_path, change))


def test_eva_adapters_as_peft_saves_them_are_read(tmp_path: Path) -> None:
    """EVA chooses the start of A and the ranks, and leaves the base alone."""
    with peft() as module:
        options = {"init_lora_weights": "eva", "eva_config": module.EvaConfig()}
        record = json.loads(json.dumps(module.LoraConfig(r=RANK, lora_alpha=8, **options).to_dict(), default=list))
    change = {"init_lora_weights": record["init_lora_weights"], "eva_config": record["eva_config"]}
    assert len(read_adapter(edited(tmp_path, change)).modules) == 1


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({f"{PREFIX}.lora_magnitude_vector.weight": torch.ones(48)}, "lora_magnitude_vector.weight, which is not the lora_A or lora_B"),
        ({"base_model.model.lm_head.weight": torch.ones(97, 48)}, "lm_head.weight, which is not"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 97)}, "lora_embedding_A, which is not"),
        ({f"{PREFIX}.lora_B.bias": torch.ones(48)}, "lora_B.bias, which is not"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 48)}, "which is not the lora_A or lora_B"),
        ({f"{PREFIX}.lora_A.weight": ..., f"{PREFIX}.lora_B.weight": ..., "x": torch.ones(1)}, "holds x"),
        ({f"{PREFIX}.lora_B.weight": ...}, "q_proj has only one of lora_A and lora_B"),
        ({f"{PREFIX}.lora_A.weight": ...}, "q_proj has only one of lora_A and lora_B"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(5, 48)}, r"q_proj has factors \[5, 48\]"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(4)}, r"q_proj has factors \[4\]"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(4, 4, 1)}, "q_proj has factors"),
        ({f"{PREFIX}.lora_A.weight": torch.full((4, 48), math.nan)}, "q_proj holds NaN"),
        ({f"{PREFIX}.lora_B.weight": torch.full((48, 4), math.inf)}, "q_proj holds NaN or infinity"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(4, 48, dtype=torch.float64)}, "not float32, float16 or bfloat16"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(4, 48, dtype=torch.int8)}, "not float32, float16 or bfloat16"),
    ],
    ids=lambda value: str(list(value)[-1] if isinstance(value, dict) else value)[:60],
)
def test_weights_that_are_refused(weights: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=match):
        read_adapter(edited(tmp_path, weights=weights))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"no {CONFIG}: not a PEFT adapter"):
        read_adapter(tmp_path / "nowhere")
    folder = edited(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(BadInput, match=f"no {WEIGHTS}"):
        read_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(BadInput, match=f"no {CONFIG}"):
        read_adapter(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no adapter weights"):
        read_adapter(edited(tmp_path, weights={f"{PREFIX}.lora_{part}.weight": ... for part in "AB"}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b'{"peft_type": "LORA"}' + b" " * 2**20])
def test_configurations_that_are_none(content: bytes, tmp_path: Path) -> None:
    folder = edited(tmp_path)
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(BadInput, match=CONFIG):
        read_adapter(folder)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}"])
def test_weights_that_are_none(content: bytes, tmp_path: Path) -> None:
    folder = edited(tmp_path)
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(BadInput, match="not a safetensors file"):
        read_adapter(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(["LORA", "none", "q_proj"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.sampled_from(["q_proj", ".*"]), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "use_rslora", "use_dora", "peft_type", "other"]


@settings(max_examples=120)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_configuration_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any]) -> None:
    folder = edited(tmp_path_factory.getbasetemp(), change)
    try:
        adapter = read_adapter(folder)
    except ClovenError:
        return
    assert all(math.isfinite(module.scale) and module.scale > 0 for module in adapter.modules)


@settings(max_examples=60)
@given(st.data())
def test_any_damage_to_the_weights_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = edited(tmp_path_factory.getbasetemp())
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content)
    try:
        adapter = read_adapter(folder)
    except ClovenError:
        return
    assert all(bool(module.a.isfinite().all()) for module in adapter.modules)


def test_no_values_in_a_repr() -> None:
    adapter = read_adapter(adapter_folder())
    assert "tensor" not in repr(adapter) and "LoraModule(" in repr(adapter) and repr(adapter.modules[0]).endswith(f"r={RANK})")
