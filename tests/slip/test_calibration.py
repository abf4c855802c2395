from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import cloven
from cloven.errors import BadInput
from cloven.field.prg import SecretStream
from cloven.model.groups import trace_groups
from cloven.model.source import open_source
from cloven.slip.calibration import TOKENS, calibrate, text_sha256
from cloven.slip.config import SlipConfig
from cloven.slip.exposed_matrix import expose
from cloven.slip.prepare import prepare_slip
from cloven.zoo.demo import demo_model_path
from tests.split_models import demo_model, demo_tokenizer, tiny

TEXT = "The castle was built on a hill, and the river ran below it. " * 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(TEXT, encoding="utf-8")
    return path


def means_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


@torch.no_grad()
def test_root_mean_squares_of_every_groups_input(tmp_path: Path, text: Path) -> None:
    """Against hooks on one forward pass over the whole text."""
    source = open_source(demo_model_path())
    groups = trace_groups(source.config)
    calibrate(source, groups, text, tmp_path / "out.safetensors")
    found = means_of(tmp_path / "out.safetensors")
    assert stat.S_IMODE((tmp_path / "out.safetensors").stat().st_mode) == 0o600
    assert set(found) == {str(index) for index in range(len(groups))}
    model, inputs = demo_model(), {}
    hooks = [
        model.get_submodule(group[0]).register_forward_pre_hook(lambda _, args, i=index: inputs.update({i: args[0].double()}))
        for index, group in enumerate(groups)
    ]
    ids = demo_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    assert 100 < ids.shape[1] < 512  # one window
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for index, x in inputs.items():
        expected = x.reshape(-1, x.shape[-1]).square().mean(0).sqrt()
        assert torch.allclose(found[str(index)], expected, rtol=0.05, atol=1e-3 * float(expected.max()))  # the demo's weights are bf16


def test_the_columns_that_matter_are_quantised_finer() -> None:
    """Two loud inputs among quiet ones: the output's error falls, and codes stay in range."""
    w = torch.randn(64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    activations = torch.full((48,), 0.05, dtype=torch.float64)
    activations[[3, 17]] = 20.0
    plain, aware = expose(w, 1, None), expose(w, 1, None, activations=activations)
    errors = [float(((w - matrix.dequantised()) * activations).square().sum()) for matrix in (plain, aware)]
    assert errors[1] < 0.5 * errors[0]
    assert int(aware.codes.min()) >= -127
    norms = aware.codes.double().norm(dim=0)
    assert norms[[3, 17]].min() > norms.median()  # and whoever holds the codes sees which they are: as documented


def test_even_activations_change_nothing() -> None:
    w = torch.randn(32, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    same = expose(w, 2, SecretStream(bytes(32), "t"), activations=torch.ones(24, dtype=torch.float64))
    plain = expose(w, 2, SecretStream(bytes(32), "t"))
    assert torch.equal(same.codes, plain.codes) and torch.equal(same.column_scale, plain.column_scale)


def test_activations_of_zero(text: Path) -> None:
    w = torch.randn(8, 6, dtype=torch.float64)
    matrix = expose(w, 1, None, activations=torch.zeros(6, dtype=torch.float64))
    assert bool(torch.isfinite(matrix.dequantised()).all())


def test_a_split_with_calibration(tmp_path: Path, text: Path) -> None:
    bundle = prepare_slip(demo_model_path(), tmp_path / "out", calibration=text)
    bundle.verify()
    assert sorted(path.name for path in bundle.path.iterdir()) == ["exposed", "trusted"]
    assert not any("calibration" in path.name for path in bundle.path.rglob("*"))  # nothing of the text stays
    again = prepare_slip(demo_model_path(), tmp_path / "again", calibration=text, key=bundle.trusted / "split.key")
    assert again.id == bundle.id
    with pytest.raises(BadInput, match="calibration"):
        prepare_slip(demo_model_path(), tmp_path / "other", key=bundle.trusted / "split.key")


def test_with_a_public_adapter_it_depends_on_the_base_alone(tmp_path: Path, text: Path) -> None:
    plain = SlipConfig(secret_fraction=0, scramble="none")
    base = prepare_slip(demo_model_path(), tmp_path / "base", plain, calibration=text)
    adapted = prepare_slip(demo_model_path(), tmp_path / "adapted", adapter=cloven.demo_adapter_path(), calibration=text)
    assert adapted.id == base.id


@pytest.mark.parametrize("content", [b"", b"  \n "])
def test_an_empty_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="empty"):
        prepare_slip(demo_model_path(), tmp_path / "out", calibration=path)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_no_such_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        prepare_slip(demo_model_path(), tmp_path / "out", calibration=tmp_path / "missing")


def test_a_model_without_a_tokenizer(tmp_path: Path, text: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match="tokenizer"):
        prepare_slip(tmp_path / "model", tmp_path / "out", calibration=text)
    with pytest.raises(BadInput, match="tokenizer"):
        prepare_slip(tiny("llama"), tmp_path / "out", calibration=text)
    assert not (tmp_path / "out").exists()


def test_the_text_is_named_by_what_is_read_of_it(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_text("a" * 2**20)
    long.write_text("a" * (2**20 + 100))
    assert text_sha256(short) == text_sha256(long) and TOKENS < 2**20
