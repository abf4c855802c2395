"""`prepare_kv_shield`: what is written, with which modes, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, Conv1D, LlamaConfig, LlamaForCausalLM, Phi3Config, Qwen3ForCausalLM

import cloven
from cloven.bundle.manifest import MANIFEST
from cloven.bundle.verification import sha256_file, verify_files
from cloven.errors import BadInput, ClovenError, RunError, UnsupportedModel
from cloven.kv_shield import prepare as module
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.manifest import EXPOSED, KEYS_FILE, TRUSTED, KvManifest
from cloven.kv_shield.prepare import attention_shapes, prepare_kv_shield
from cloven.zoo.tiny import tiny_config, tiny_model
from tests.kv_bundles import FAMILIES, FLOAT32_TOLERANCE, MODES, deviation, enclave, ids_of, kv_bundle, load, stored_keys, tensors
from tests.split_models import logits, tiny, tiny_folder

BOTH = [(family, mode) for family in FAMILIES for mode in MODES]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def exposed_weights(out: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted((out / "exposed").glob("*.safetensors")):
        found.update(tensors(path))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written(mode: str) -> None:
    assert listing(kv_bundle("llama", mode) / "trusted") == [KEYS_FILE, MANIFEST]
    exposed = set(listing(kv_bundle("llama", mode) / "exposed"))
    assert {"config.json", "generation_config.json", MANIFEST, "model-00001.safetensors", "model.safetensors.index.json"} <= exposed
    assert sorted(path.name for path in kv_bundle("llama", mode).iterdir()) == ["exposed", "trusted"]


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    out = kv_bundle("llama", mode)
    assert stat.S_IMODE((out / "trusted").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out / "trusted").iterdir()} == {0o600}
    assert stat.S_IMODE((out / "exposed").stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out / "exposed").iterdir()} == {0o644}


def test_modes_whatever_the_umask(tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append(stat.S_IMODE((tmp_path / ".out.partial").stat().st_mode))

    before = os.umask(0)
    try:
        prepare_kv_shield(tiny("llama"), tmp_path / "out", progress=progress)
    finally:
        os.umask(before)
    assert set(seen) == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out" / "trusted").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "out" / "trusted").stat().st_mode) == 0o700


@pytest.mark.parametrize(("family", "mode"), BOTH)
def test_manifests(family: str, mode: str) -> None:
    out = kv_bundle(family, mode)
    exposed, trusted = KvManifest.read(out / "exposed", EXPOSED), KvManifest.read(out / "trusted", TRUSTED)
    assert exposed.bundle == trusted.bundle and exposed.layers == trusted.layers == attention_shapes(tiny(family))
    assert exposed.config == trusted.config == KvShieldConfig(mode)
    assert trusted.limit == 128
    for folder, manifest in ((out / "exposed", exposed), (out / "trusted", trusted)):
        verify_files(folder, manifest.files)
        assert set(manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST}


@pytest.mark.parametrize(("family", "mode"), BOTH)
def test_the_projections_are_permuted_and_nothing_else(family: str, mode: str) -> None:
    plain, exposed = tiny(family).state_dict(), exposed_weights(kv_bundle(family, mode))
    changed = set()
    for index, layer in enumerate(attention_shapes(tiny(family))):
        order = torch.arange(sum(layer.widths()))
        if mode == "permute":
            keys, per_kv = stored_keys(family), layer.heads // layer.kv_heads
            pi = torch.cat([keys[f"{index}.qk"].repeat_interleave(per_kv, 0), keys[f"{index}.qk"], keys[f"{index}.v"]])
            order = (pi + layer.head_dim * torch.arange(len(pi))[:, None]).flatten()
        names = [f"{layer.name}.{name}" for name in layer.projections]
        transposed = isinstance(tiny(family).get_submodule(names[0]), Conv1D)
        for what in ("weight", "bias"):
            if f"{names[0]}.{what}" not in plain:
                continue
            whole = torch.cat([plain[f"{name}.{what}"].T if transposed and what == "weight" else plain[f"{name}.{what}"] for name in names])
            stored = [exposed[f"{name}.{what}"] for name in names]
            if what == "weight":
                assert all(tensor.dim() == 1 for tensor in stored)
                hidden = plain[f"{names[0]}.weight"].shape[0 if transposed else 1]
                stored = [tensor.view(hidden, -1).T if transposed else tensor.view(-1, hidden) for tensor in stored]
            assert torch.equal(torch.cat(stored), whole[order])
            assert mode == "session" or not torch.equal(torch.cat(stored), whole)
            changed.update(f"{name}.{what}" for name in names)
    for name, tensor in exposed.items():
        if name not in changed:
            assert torch.equal(tensor, plain[name]), name
    left_out = {name for name in plain if name not in exposed}
    tied = {"lm_head.weight"} if plain.get("lm_head.weight") is not None and tiny(family).config.tie_word_embeddings else set()
    assert left_out == tied | {name for name in plain if name.endswith(("q_norm.weight", "k_norm.weight"))}


def test_two_heads_two_layers_and_k_and_v_have_permutations_of_their_own() -> None:
    for family in FAMILIES:
        rows = [tuple(row.tolist()) for name, pi in stored_keys(family).items() if name.endswith((".qk", ".v")) for row in pi]
        assert len(rows) == len(set(rows)) == 2 * 2 * attention_shapes(tiny(family))[0].kv_heads
        assert all(sorted(row) == list(range(len(row))) for row in rows)


def test_session_mode_stores_no_keys() -> None:
    assert set(stored_keys("llama", "session")) == {f"rotary.{name}" for name in ("frequencies", "scaling", "frequency", "partner", "sign")}
    assert not stored_keys("gpt2", "session")
    assert {"0.q_norm", "1.k_norm"} <= set(stored_keys("qwen3", "session"))


def test_two_bundles_of_one_model_share_no_key(tmp_path: Path) -> None:
    one, two = (prepare_kv_shield(tiny("llama"), tmp_path / name) for name in ("one", "two"))
    assert one.bundle != two.bundle
    keys = [tensors(tmp_path / name / "trusted" / KEYS_FILE) for name in ("one", "two")]
    assert not any(torch.equal(keys[0][name], keys[1][name]) for name in ("0.qk", "0.v", "1.qk", "1.v"))


def test_torchs_generator_is_not_asked(tmp_path: Path) -> None:
    """The same seeds give other keys, and the caller's generator goes on where it was."""
    found = []
    for name in ("one", "two"):
        torch.manual_seed(7)
        prepare_kv_shield(tiny("llama"), tmp_path / name)
        found.append(tensors(tmp_path / name / "trusted" / KEYS_FILE)["0.qk"])
        after = torch.rand(1)
        torch.manual_seed(7)
        assert torch.equal(after, torch.rand(1))
    assert not torch.equal(*found)


def test_the_exposed_half_holds_no_key() -> None:
    out = kv_bundle("llama", "permute")
    content = b"".join(path.read_bytes() for path in (out / "exposed").iterdir())
    for name, pi in stored_keys("llama").items():
        if name.endswith((".qk", ".v")):
            for row in (*pi, *pi.argsort(1)):
                assert row.numpy().tobytes() not in content and json.dumps(row.tolist()).encode() not in content


def test_the_source_is_not_changed(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    before, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    expected = logits(model, ids_of(1, 5))
    prepare_kv_shield(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config and torch.equal(logits(model, ids_of(1, 5)), expected)


def test_a_bfloat16_source_is_not_changed(tmp_path: Path) -> None:
    model = tiny_model("qwen3").to(torch.bfloat16)
    prepare_kv_shield(model, tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", MODES)
def test_from_a_directory(tmp_path: Path, mode: str) -> None:
    folder = tiny_folder("llama")
    prepare_kv_shield(folder, tmp_path / "out", KvShieldConfig(mode))
    with enclave(tmp_path / "out" / "trusted") as (address, _):
        model = load(tmp_path / "out")
        with cloven.attach(model, address, timeout=5):
            assert deviation(logits(model, ids_of(2, 9)), logits(tiny("llama"), ids_of(2, 9))) < FLOAT32_TOLERANCE


def test_no_code_and_no_path_in_the_configuration() -> None:
    record = json.loads((kv_bundle("llama", "permute") / "exposed" / "config.json").read_text())
    assert "auto_map" not in record and "_name_or_path" not in record
    assert record["architectures"] == ["LlamaForCausalLM"] and record["dtype"] == "float32"
    assert set(record["quantization_config"]) == {"quant_method", "scheme", "version", "bundle", "model"}
    assert "enclave" not in json.dumps(record)


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare_kv_shield(tiny("llama"), tmp_path / "out", progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(seen[0][2]))


# --- refusals (loading without cloven: tests/model/test_without_cloven.py)


def refused(tmp_path: Path, model: Any, kind: type[ClovenError], match: str, config: KvShieldConfig | None = None) -> None:
    before = listing(tmp_path)
    with pytest.raises(kind, match=match) as caught:
        prepare_kv_shield(model, tmp_path / "folder" / "out", config)
    assert "\n" not in str(caught.value)
    assert [name for name in listing(tmp_path) if name not in (*before, "folder")] == []


@pytest.mark.parametrize(("family", "kind"), [("mixtral", "mixtral"), ("gpt-neox", "gpt_neox"), ("gemma2", "gemma2")])
def test_other_families_are_refused_by_name(tmp_path: Path, family: str, kind: str) -> None:
    refused(tmp_path, tiny_model(family), UnsupportedModel, f"{kind}: KV-Shield supports llama, qwen2")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_change_with_the_length(tmp_path: Path, kind: str) -> None:
    config: Any = tiny_config("phi3" if kind == "longrope" else "llama")
    rope: dict[str, Any] = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    config.rope_parameters = rope
    model = (type(tiny("phi3")) if isinstance(config, Phi3Config) else LlamaForCausalLM)(config)
    refused(tmp_path, model, UnsupportedModel, kind)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotations_of_fixed_frequencies(tmp_path: Path, rope: dict[str, Any]) -> None:
    torch.manual_seed(3)
    config: LlamaConfig = tiny_config("llama")  # type: ignore[assignment]
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    plain = LlamaForCausalLM(config).eval()
    for mode in MODES:
        prepare_kv_shield(plain, tmp_path / mode, KvShieldConfig(mode))
        with enclave(tmp_path / mode / "trusted") as (address, _):
            model = load(tmp_path / mode)
            with cloven.attach(model, address, timeout=5):
                assert deviation(logits(model, ids_of(2, 40)), logits(plain, ids_of(2, 40))) < FLOAT32_TOLERANCE


def test_norms_that_are_no_rms_norms(tmp_path: Path) -> None:
    model: Qwen3ForCausalLM = tiny_model("qwen3")
    model.model.layers[1].self_attn.k_norm = torch.nn.LayerNorm(12)
    refused(tmp_path, model, UnsupportedModel, "qwen3: its norms of q and k are not RMS norms per head")


def test_projections_of_unexpected_sizes(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(48, 36, bias=False)
    refused(tmp_path, model, UnsupportedModel, "projections of unexpected sizes")


def test_no_model(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "nowhere", BadInput, "no such model directory")


def test_a_bundle_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path, kv_bundle("llama", "permute") / "exposed", UnsupportedModel, "already quantised or split")


def test_an_out_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("dear")
    with pytest.raises(BadInput, match="exists already"):
        prepare_kv_shield(tiny("llama"), tmp_path / "out")
    assert listing(tmp_path) == ["out", "out/letter"]


@pytest.mark.parametrize("what", ["save_file", "sha256_file", "_write_configuration", "bundle_id"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("what")])
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, what, fail)
    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        prepare_kv_shield(tiny("llama"), tmp_path / "out")
    assert listing(tmp_path) == []
    monkeypatch.undo()
    prepare_kv_shield(tiny("llama"), tmp_path / "out")
    assert sha256_file(tmp_path / "out" / "trusted" / KEYS_FILE) and AutoConfig.from_pretrained(tmp_path / "out" / "exposed") is not None
