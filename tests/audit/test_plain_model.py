from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cloven.audit.plain_model import plain_model
from cloven.errors import BadBundle, ClovenError, ForeignBundle, TamperedBundle
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.prepare import prepare_kv_shield
from tests.kv_bundles import MODES, ids_of, kv_bundle
from tests.split_models import copied, logits, tiny, tiny_bundle

FAMILIES = ("llama", "llama-mha", "llama-tied", "qwen2", "qwen3", "mistral", "gemma", "phi3", "glm", "gpt2")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_comes_back(family: str, mode: str) -> None:
    model, config = plain_model(kv_bundle(family, mode))
    expected = tiny(family).state_dict()
    state = model.state_dict()
    assert config.mode == mode and set(state) == set(expected) and not model.training
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    assert torch.equal(logits(model, ids_of(2, 9)), logits(tiny(family), ids_of(2, 9)))


def test_in_permute_mode_the_exposed_weights_are_others() -> None:
    """Weakened: what comes back without the permutations is not the model."""
    from safetensors.torch import load_file

    exposed: dict[str, torch.Tensor] = {}
    for path in (kv_bundle("llama", "permute") / "exposed").glob("*.safetensors"):
        exposed |= load_file(path)
    for name in ("q_proj", "k_proj", "v_proj"):
        full = f"model.layers.0.self_attn.{name}.weight"
        mine, original = exposed[full].flatten(), tiny("llama").state_dict()[full].flatten()
        assert not torch.equal(mine, original) and torch.equal(mine.sort().values, original.sort().values)


def test_bf16_weights_come_back_as_float32(tmp_path: Path) -> None:
    from cloven.zoo.tiny import tiny_model

    original = tiny_model("qwen2").to(torch.bfloat16)
    prepare_kv_shield(original, tmp_path / "out", KvShieldConfig("permute"))
    model, _ = plain_model(tmp_path / "out")
    expected = original.state_dict()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, expected[name].float()) for name, tensor in model.state_dict().items())


def copy_of(family: str, mode: str, where: Path) -> Path:
    shutil.copytree(kv_bundle(family, mode), where)
    return where


@pytest.mark.parametrize("mode", MODES)
def test_foreign_halves(mode: str, tmp_path: Path) -> None:
    """Of another model, of another preparation of the same one, and of the other mode."""
    prepare_kv_shield(tiny("llama"), tmp_path / "second", KvShieldConfig(mode))
    others = [kv_bundle("qwen2", mode), tmp_path / "second", kv_bundle("llama", "session" if mode == "permute" else "permute")]
    for number, other in enumerate(others):
        out = copy_of("llama", mode, tmp_path / str(number))
        shutil.rmtree(out / "trusted")
        shutil.copytree(other / "trusted", out / "trusted")
        with pytest.raises(ForeignBundle, match="halves are of two"):
            plain_model(out)


@pytest.mark.parametrize("name", ["exposed/config.json", "exposed/model-00001.safetensors", "trusted/keys.safetensors"])
def test_tampered_files(name: str, tmp_path: Path) -> None:
    out = copy_of("llama", "permute", tmp_path / "out")
    half, _, file = name.partition("/")
    path = next((out / half).glob("*.safetensors")) if "model" in file else out / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TamperedBundle, match=path.name):
        plain_model(out)


@pytest.mark.parametrize("missing", ["exposed/manifest.json", "trusted/manifest.json", "trusted/keys.safetensors", "exposed/config.json"])
def test_missing_files(missing: str, tmp_path: Path) -> None:
    out = copy_of("llama", "permute", tmp_path / "out")
    (out / missing).unlink()
    with pytest.raises(ClovenError, match=Path(missing).name if "manifest" not in missing else "."):
        plain_model(out)


def test_other_bundles(tmp_path: Path) -> None:
    with pytest.raises(BadBundle):
        plain_model(copied(tiny_bundle("llama"), tmp_path / "slip").path)
    with pytest.raises(BadBundle):
        plain_model(tmp_path / "nowhere")
    swapped = tmp_path / "swapped"
    shutil.copytree(kv_bundle("llama", "permute") / "exposed", swapped / "trusted")
    shutil.copytree(kv_bundle("llama", "permute") / "trusted", swapped / "exposed")
    with pytest.raises(BadBundle):
        plain_model(swapped)
