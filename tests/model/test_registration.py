from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import cloven
from cloven.bundle.bundle import Bundle
from cloven.bundle.verification import sha256_file
from cloven.errors import BadBundle, BadInput, ClovenError, ForeignBundle, NotAttached, TamperedBundle
from cloven.model.registration import ClovenConfig, ClovenQuantizer, register_scheme, scheme_named
from cloven.model.runtime import session_of
from cloven.slip.layer import SplitLinear
from tests.split_models import (
    attached,
    copied,
    demo_bundle,
    demo_tokenizer,
    load,
    logits,
    random_ids,
    relative_error,
    run_python,
    tiny,
    tiny_bundle,
    worker_thread,
)

IDS = random_ids(97, 2, 6)
SHARD = "model-00001.safetensors"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of one's own, to be damaged."""
    return copied(tiny_bundle("llama"), tmp_path / "out")


def edit_json(path: Path, change: Any) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def promise_what_is_there(bundle: Bundle) -> None:
    """Make the trusted manifest agree with the files again, as a wrong `prepare` (not an attacker) would."""

    def change(record: dict[str, Any]) -> None:
        record["files"] = {name: sha256_file(bundle.trusted / name) for name in record["files"]}

    edit_json(bundle.trusted / "manifest.json", change)


# --- loading


def test_from_pretrained_gives_an_ordinary_model() -> None:
    model = load(tiny_bundle("llama").trusted)
    assert type(model) is type(tiny("llama"))
    assert sum(isinstance(module, SplitLinear) for module in model.modules()) == 15
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert session_of(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_factors_and_scales_stay_float32_whatever_the_model_computes_in(dtype: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_bundle("llama").trusted, dtype=dtype)
    assert model.model.embed_tokens.weight.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.secret_a.dtype == layer.secret_b.dtype == layer.row_scale.dtype == layer.column_scale.dtype == torch.float32
    assert layer.row_gather.dtype == layer.column_gather.dtype == torch.int32


def test_an_unattached_call_says_what_to_do() -> None:
    with pytest.raises(NotAttached, match=r"q_proj,k_proj,v_proj\}: no worker is attached.*CLOVEN_WORKER.*cloven\.attach"):
        logits(load(tiny_bundle("llama").trusted), IDS)


def test_repr_of_model_and_configuration_show_no_values() -> None:
    model = load(tiny_bundle("llama").trusted)
    for text in (repr(model), repr(model.config.quantization_config)):
        assert "tensor(" not in text and "secret" not in text
    assert tiny_bundle("llama").id in repr(model.config.quantization_config)


LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
try:
    model(input_ids=torch.ones(1, 3, dtype=torch.long))
    print("it ran on random weights")
except cloven.ClovenError as error:
    print(type(error).__name__)
"""


def test_importing_cloven_first_and_again() -> None:
    """The hook waits for transformers, once, and a second import of cloven changes nothing."""
    script = f"""
import sys, importlib, cloven
importlib.reload(cloven)
print(sum(type(finder).__module__ == "cloven.registration_hook" for finder in sys.meta_path), "transformers" in sys.modules)
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
print(sum(type(finder).__module__ == "cloven.registration_hook" for finder in sys.meta_path), "cloven" in auto.AUTO_QUANTIZER_MAPPING)
{LOAD}
for name in [name for name in sys.modules if name == "cloven" or name.startswith("cloven.")]:
    del sys.modules[name]
import cloven
cloven.SlipConfig, cloven.ClovenConfig
print(auto.AUTO_QUANTIZER_MAPPING["cloven"].__name__)
"""
    result = run_python(script, str(tiny_bundle("llama").trusted))
    assert result.stdout.splitlines() == ["1 False", "0 True", "NotAttached", "ClovenQuantizer"], result.stderr


def test_importing_cloven_imports_neither_torch_nor_transformers() -> None:
    script = "import sys, cloven; print([name for name in ('torch', 'transformers', 'zmq', 'numpy') if name in sys.modules])"
    assert run_python(script).stdout == "[]\n"


def test_registering_twice_is_harmless() -> None:
    from cloven import registration_hook
    from cloven.model import registration

    registration_hook.install()
    registration_hook.register()
    registration._register()
    assert AUTO_QUANTIZER_MAPPING["cloven"] is ClovenQuantizer and AUTO_QUANTIZATION_CONFIG_MAPPING["cloven"] is ClovenConfig


def test_unknown_schemes() -> None:
    for name in ("kv_shield", None, 3, ["slip"]):
        with pytest.raises(BadBundle, match="unknown scheme"):
            scheme_named(name)
    register_scheme("slip", scheme_named("slip"))


# --- what must not load


def refused(bundle: Bundle, kind: type[ClovenError], match: str) -> None:
    with pytest.raises(kind, match=match):
        load(bundle.trusted)


def test_a_missing_tensor(bundle: Bundle) -> None:
    """transformers would only warn, and run on uninitialised memory."""
    rewrite(bundle, lambda held: held.pop("model.layers.1.mlp.up_proj.secret_b"))
    promise_what_is_there(bundle)
    refused(bundle, BadBundle, r"tensor model\.layers\.1\.mlp\.up_proj\.secret_b is missing")


def test_an_unexpected_tensor(bundle: Bundle) -> None:
    rewrite(bundle, lambda held: held.update({"model.layers.1.mlp.up_proj.extra": torch.zeros(2)}))
    promise_what_is_there(bundle)
    refused(bundle, BadBundle, r"tensor model\.layers\.1\.mlp\.up_proj\.extra is unexpected")


def rewrite(bundle: Bundle, change: Any) -> None:
    """Change what the shard of layer 1's up_proj holds."""
    index = bundle.trusted / "model.safetensors.index.json"
    shard_name = json.loads(index.read_text())["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    held: dict[str, Tensor] = {}
    with safe_open(bundle.trusted / shard_name, framework="pt") as shard:
        held.update({name: shard.get_tensor(name).clone() for name in shard.keys()})  # noqa: SIM118 (no mapping)
    change(held)
    save_file(held, bundle.trusted / shard_name, metadata={"format": "pt"})

    def reindex(record: dict[str, Any]) -> None:
        others = {name: place for name, place in record["weight_map"].items() if place != shard_name}
        record["weight_map"] = others | dict.fromkeys(held, shard_name)

    edit_json(index, reindex)


@pytest.mark.parametrize("position", [-1, 0.5])
def test_a_changed_byte_in_a_shard(bundle: Bundle, position: float) -> None:
    path = bundle.trusted / SHARD
    content = bytearray(path.read_bytes())
    content[-1 if position == -1 else int(len(content) * position)] ^= 1
    path.write_bytes(content)
    refused(bundle, TamperedBundle, r"trusted/model-00001\.safetensors: the file's bytes differ")


def test_a_changed_configuration(bundle: Bundle) -> None:
    edit_json(bundle.trusted / "config.json", lambda record: record.update(rms_norm_eps=0.5))
    refused(bundle, TamperedBundle, r"trusted/config\.json: the file's bytes differ")


def test_a_shard_that_the_manifest_does_not_know(bundle: Bundle) -> None:
    edit_json(bundle.trusted / "manifest.json", lambda record: record["files"].pop(SHARD))
    refused(bundle, TamperedBundle, SHARD)


def test_the_manifest_is_missing(bundle: Bundle) -> None:
    (bundle.trusted / "manifest.json").unlink()
    refused(bundle, BadBundle, r"has no manifest\.json")


def test_the_configuration_of_another_bundle(bundle: Bundle) -> None:
    edit_json(bundle.trusted / "config.json", lambda record: record["quantization_config"].update(bundle="0" * 32))
    refused(bundle, ForeignBundle, "0" * 32 + r".*manifest\.json of " + bundle.id)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version(bundle: Bundle, version: Any) -> None:
    edit_json(bundle.trusted / "config.json", lambda record: record["quantization_config"].update(version=version))
    refused(bundle, BadBundle, "version")


@pytest.mark.parametrize("model", [None, {}, {"precision": "int8", "scramble": "none", "rounds": 0, "groups": []}])
def test_a_malformed_description(bundle: Bundle, model: Any) -> None:
    edit_json(bundle.trusted / "config.json", lambda record: record["quantization_config"].update(model=model))
    promise_what_is_there(bundle)
    refused(bundle, BadBundle, "malformed")


def test_an_unknown_setting_in_the_configuration(bundle: Bundle) -> None:
    edit_json(bundle.trusted / "config.json", lambda record: record["quantization_config"].update(worker_hint="ipc:///evil"))
    refused(bundle, BadInput, "unknown setting 'worker_hint'")


def test_an_address_in_the_configuration_is_not_used(bundle: Bundle) -> None:
    """A bundle must not choose its worker: addresses are never stored, and one that somebody wrote there is not believed."""
    edit_json(
        bundle.trusted / "config.json", lambda record: record["quantization_config"].update(worker="ipc:///nowhere/evil/w", timeout=0.2)
    )
    promise_what_is_there(bundle)
    with pytest.raises(BadInput):
        load(bundle.trusted)


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(BadInput, match=r"LlamaModel has no module .*: load this bundle with AutoModelForCausalLM"):
        AutoModel.from_pretrained(tiny_bundle("llama").trusted)


def quantizer() -> ClovenQuantizer:
    return ClovenQuantizer(ClovenConfig(scheme="slip"), pre_quantized=True)


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0, "mps", "disk", {"": "cuda:0"}, {"model": "cpu", "lm_head": "disk"}, {"": 0}])
def test_other_devices_are_refused(device_map: Any) -> None:
    """The quantizer itself is asked: from_pretrained takes a device_map only where accelerate is installed."""
    with pytest.raises(BadInput, match="device_map: the trusted half of a split model runs on the CPU"):
        quantizer().validate_environment(device_map=device_map)
    with pytest.raises((BadInput, ValueError)):
        load(tiny_bundle("llama").trusted, device_map=device_map)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}, None])
def test_the_cpu_is_allowed(device_map: Any) -> None:
    quantizer().validate_environment(device_map=device_map)
    assert quantizer().update_device_map(device_map) in (None, {"": "cpu"})


# --- where the worker is


def test_the_worker_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle("llama")
    with worker_thread(bundle) as address:
        monkeypatch.setenv("CLOVEN_WORKER", address)
        model = load(bundle.trusted)
        session = session_of(model)
        assert session is not None
        with session:
            assert relative_error(logits(model, IDS), logits(tiny("llama"), IDS)) < 0.1


def test_the_copy_of_the_exposed_half_from_the_environment(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path) -> None:
    bundle.exposed.rename(tmp_path / "elsewhere")
    with worker_thread(tiny_bundle("llama")) as address:
        monkeypatch.setenv("CLOVEN_WORKER", address)
        refused(bundle, BadBundle, "--exposed PATH")
        monkeypatch.setenv("CLOVEN_EXPOSED", str(tmp_path / "elsewhere"))
        session = session_of(load(bundle.trusted))
        assert session is None or session.close() is None


def load_with(trusted: Path, config: ClovenConfig) -> PreTrainedModel:
    """transformers says that the run-time settings replace the stored ones, which is just what they are for."""
    with pytest.warns(UserWarning, match="loading attributes"):
        return load(trusted, quantization_config=config)


def test_the_worker_from_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle("llama")
    monkeypatch.setenv("CLOVEN_WORKER", "ipc:///nowhere/w")  # what is given goes before what is in the environment
    with worker_thread(bundle) as address:
        model = load_with(bundle.trusted, ClovenConfig(worker=address, timeout=7.0))
        session = session_of(model)
        assert session is not None and session.channel.timeout == 7.0
        with session:
            assert relative_error(logits(model, IDS), logits(tiny("llama"), IDS)) < 0.1


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(BadInput, match="unknown setting 'adress'"):
        ClovenConfig(adress="ipc:///x")


def test_the_address_is_never_stored(tmp_path: Path) -> None:
    """No configuration knows the worker, and a split model cannot be saved again: its manifest would no longer fit."""
    bundle = tiny_bundle("llama")
    with worker_thread(bundle) as address:
        model = load_with(bundle.trusted, ClovenConfig(worker=address, timeout=7.0))
        session = session_of(model)
        assert session is not None
        with session:
            for text in (repr(model.config), json.dumps(model.config.to_dict(), default=str), model.config.to_json_string()):
                assert address not in text and "timeout" not in text
            with pytest.raises(ValueError, match="not serializable"):
                model.save_pretrained(tmp_path / "saved")
            assert not list(tmp_path.rglob("*.safetensors"))
            model.config.save_pretrained(tmp_path / "config")
            assert address.encode() not in (tmp_path / "config" / "config.json").read_bytes()


def test_a_copied_directory_is_as_good_as_the_first(bundle: Bundle) -> None:
    with attached(tiny_bundle("llama")) as (first, _), attached(bundle) as (second, _):
        assert relative_error(logits(first, IDS), logits(second, IDS)) < 1e-6


# --- the ecosystem on top


def test_generate_with_prompt_lookup() -> None:
    """Speculation checks several positions in one pass: the same tokens, in fewer exchanges."""
    with attached(demo_bundle("int8x2")) as (model, session):
        inputs = demo_tokenizer()("ROMEO:\nI will, I will, I will, I", return_tensors="pt")
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        exchanges = session.telemetry.total().exchanges
        session.telemetry.reset()
        looked_up = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(plain, looked_up)
        assert session.telemetry.total().exchanges <= exchanges


def test_a_pipeline() -> None:
    with attached(demo_bundle("int8x2")) as (model, _):
        write = pipeline("text-generation", model=model, tokenizer=demo_tokenizer())
        text = write("ROMEO:", max_new_tokens=6, do_sample=False)[0]["generated_text"]
        tokens = model.generate(**demo_tokenizer()("ROMEO:", return_tensors="pt"), max_new_tokens=6, do_sample=False)
        assert text == demo_tokenizer().decode(tokens[0], skip_special_tokens=True)


def test_a_shipped_assistant_model_is_no_obstacle() -> None:
    """Two split models in one process, each with its own worker and pads."""
    with attached(tiny_bundle("llama")) as (first, _), attached(tiny_bundle("gpt2")) as (second, _):
        for model, family in ((first, "llama"), (second, "gpt2")):
            assert relative_error(logits(model, IDS), logits(tiny(family), IDS)) < 0.1


def test_the_module_can_be_reloaded() -> None:
    importlib.reload(cloven)
    assert cloven.ClovenConfig is ClovenConfig
