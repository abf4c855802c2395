"""The hash of a base: over tensors, not files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from cloven.errors import BadInput, ForeignBundle
from cloven.private_lora.base import base_sha256, require_base, weight_files
from tests.lora_bundles import plain
from tests.split_models import tiny_folder

INDEX = "model.safetensors.index.json"
SMALL = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.ones(2, dtype=torch.bfloat16), "c.d": torch.tensor(7)}


def slow_sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(b"cloven/base/1\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype)[6:], list(tensor.shape)]).encode() + b"\n")
        digest.update(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()))
    return digest.hexdigest()


def saved(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A model directory with these tensors, in so many files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return folder


def test_against_the_specification(tmp_path: Path) -> None:
    assert base_sha256(saved(tmp_path / "m", SMALL)) == slow_sha256(SMALL)


def test_a_vector(tmp_path: Path) -> None:
    assert base_sha256(saved(tmp_path / "m", SMALL)) == VECTOR


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=4),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 5)),
        min_size=1,
        max_size=5,
    )
)
def test_any_tensors_in_any_number_of_files(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[torch.dtype, list[int], int]]
) -> None:
    tensors = {name: torch.full(shape, value).to(dtype) for name, (dtype, shape, value) in kinds.items()}
    folder = tmp_path_factory.getbasetemp() / "any"
    for shards in (1, 2, 3):
        assert base_sha256(saved(folder, tensors, shards)) == slow_sha256(tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"b": SMALL["b"] + 1},
        {"b": SMALL["b"].view(3, 2)},
        {"b": SMALL["b"].view(torch.int32)},
        {"b": SMALL["b"].half()},
        {"e": torch.zeros(0)},
    ],
    ids=["value", "shape", "dtype", "precision", "one more"],
)
def test_what_it_names(change: dict[str, Tensor], tmp_path: Path) -> None:
    assert base_sha256(saved(tmp_path / "m", SMALL | change)) != VECTOR


def test_a_name_counts(tmp_path: Path) -> None:
    renamed = {"B" if name == "b" else name: tensor for name, tensor in SMALL.items()}
    assert base_sha256(saved(tmp_path / "m", renamed)) != VECTOR


def test_a_model_that_is_sharded_anew_by_transformers(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "m", max_shard_size="50KB")
    assert len(weight_files(tmp_path / "m")) > 2
    assert base_sha256(tmp_path / "m") == base_sha256(tiny_folder("llama")) != base_sha256(tiny_folder("llama-tied"))


def test_require_base() -> None:
    folder = tiny_folder("llama")
    require_base(folder, base_sha256(folder))
    with pytest.raises(ForeignBundle, match=r"not the weights of the base that the adapter was made for .* expected 0000000000000000…"):
        require_base(folder, "0" * 64)


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"no model\.safetensors"):
        base_sha256(tmp_path)
    with pytest.raises(BadInput, match=r"no model\.safetensors"):
        base_sha256(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "x", "b": 3}}',
        '{"weight_map": {"a": null}}',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_a_malformed_index(index: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index, encoding="latin-1")
    with pytest.raises(BadInput):
        base_sha256(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "x/y", "..", ""])
def test_an_index_that_names_a_file_elsewhere(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", SMALL)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(BadInput):
        base_sha256(tmp_path / "m")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing shard"])
def test_unreadable_weights(damage: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", SMALL, 2)
    path = sorted(folder.glob("*.safetensors"))[0]
    if damage == "missing shard":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if damage == "truncated" else b"x" * 100)
    with pytest.raises(BadInput, match="cannot be read"):
        base_sha256(folder)


VECTOR = "3e659ea333e55733eff8fa04a8debbb03783b176d041704f02618215b13d3fbb"
