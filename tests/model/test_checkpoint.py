"""Tensors straight from safetensors files, and where a model's are in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from cloven.errors import BadInput, ClovenError
from cloven.model.checkpoint import Checkpoint, locate
from cloven.model.source import open_source
from cloven.zoo.tiny import FAMILIES
from tests.preparations import edit_weights, own_folder
from tests.split_models import tiny, tiny_folder

RENAMED = {"gpt-neox"}  # saved with embed_out, in memory lm_head
INDEX = "model.safetensors.index.json"


def sharded(folder: Path, **files: dict[str, Tensor]) -> Path:
    """A checkpoint in several files, with its index."""
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    return indexed(folder, {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors})


def indexed(folder: Path, places: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def two_files(folder: Path) -> Path:
    return sharded(folder, one={"a": torch.arange(6.0).view(2, 3)}, two={"b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)})


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        Checkpoint(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_several_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint(two_files(tmp_path / "m"))
    assert checkpoint.names == {"a", "b", "c"}
    assert torch.equal(checkpoint.tensor("a"), torch.arange(6.0).view(2, 3)) and checkpoint.tensor("b").dtype == torch.bfloat16
    assert [checkpoint.shape(name) for name in "abc"] == [(2, 3), (4,), ()]


def test_one_file() -> None:
    checkpoint = Checkpoint(tiny_folder("llama"))
    state = tiny("llama").state_dict()
    assert checkpoint.names == set(state)
    assert all(torch.equal(checkpoint.tensor(name), tensor) and checkpoint.shape(name) == tensor.shape for name, tensor in state.items())


def test_one_file_comes_before_an_index(tmp_path: Path) -> None:
    """As transformers has it."""
    folder = two_files(tmp_path / "m")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert Checkpoint(folder).names == {"a"}


def test_a_tensor_is_read_by_memory_map(tmp_path: Path) -> None:
    """Big ones would count as this process's own memory otherwise."""
    sharded(tmp_path / "m", one={"a": torch.zeros(2**24), "b": torch.zeros(3)})
    checkpoint = Checkpoint(tmp_path / "m")
    before = anonymous()
    tensor = checkpoint.tensor("a")
    assert float(tensor.sum()) == 0 and anonymous() - before < 2**24


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_files_notice_another_checkpoint(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "m")
    before = Checkpoint(folder).files()
    assert set(before) == {"one.safetensors", "two.safetensors"} and Checkpoint(folder).files() == before
    os.utime(folder / "two.safetensors", ns=(0, 1))
    assert Checkpoint(folder).files() != before
    save_file({"a": torch.zeros(2, 4)}, folder / "one.safetensors")
    assert Checkpoint(folder).files()["one.safetensors"][0] != before["one.safetensors"][0]


# --- what is no checkpoint


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path, r"no model\.safetensors and no model\.safetensors\.index\.json: the weights cannot be loaded")


def test_pickled_weights_only(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pickled weights are never read")


def test_pickled_weights_named_by_an_index(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    refused(indexed(tmp_path, {"a": "pytorch_model.bin"}), "malformed")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"x" * 100, b"\xff" * 8 + b"{}"])
def test_a_file_that_is_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, "the weights cannot be loaded")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 10**5, "\udcff"]
)
def test_an_index_that_is_malformed(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content, errors="surrogateescape")
    refused(tmp_path, "not readable as JSON|malformed")


def test_an_index_beyond_measure(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(257 * 2**20)
    refused(tmp_path, "malformed")


@pytest.mark.parametrize(
    "place",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/secret.safetensors",
        "./one.safetensors",
        "..",
        "",
        "one.safetensors/",
        "x.bin",
    ],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, place: str) -> None:
    """It would read, and ship quantised, somebody's other weights."""
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = two_files(tmp_path / "m")
    refused(indexed(folder, {"a": "one.safetensors", "b": place}), "malformed")


@given(places=st.dictionaries(st.text(max_size=8), st.one_of(st.none(), st.integers(), st.text(max_size=20), st.lists(st.text()))))
def test_any_index_is_read_or_refused(tmp_path: Path, places: dict[str, Any]) -> None:
    try:
        Checkpoint(indexed(tmp_path, places))
    except ClovenError as error:
        assert isinstance(error, BadInput)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "m")
    (folder / "two.safetensors").unlink()
    refused(folder, r"lacks the file two\.safetensors")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(two_files(tmp_path / "m"))
    for read in (checkpoint.tensor, checkpoint.shape):
        with pytest.raises(BadInput, match="lacks the weight d"):
            read("d")
    checkpoint = Checkpoint(indexed(tmp_path / "m", {"a": "two.safetensors"}))  # the index is wrong
    for read in (checkpoint.tensor, checkpoint.shape):
        with pytest.raises(BadInput, match=r"two\.safetensors: the weights cannot be loaded: a"):
            read("a")


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "m")
    content = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").write_bytes(content[:-1])
    with pytest.raises(BadInput, match=r"one\.safetensors: the weights cannot be loaded"):
        Checkpoint(folder).tensor("a")


# --- where a model's tensors are


def located(folder: Path) -> tuple[dict[str, str] | None, Checkpoint]:
    checkpoint = Checkpoint(folder)
    return locate(open_source(folder).skeleton(torch.float32), checkpoint), checkpoint


@pytest.mark.parametrize("family", sorted({*FAMILIES} - RENAMED))
def test_every_family(family: str) -> None:
    """The whole state dict, and each tensor is the one that transformers loads."""
    places, checkpoint = located(tiny_folder(family))
    state = tiny(family).state_dict()
    assert places is not None and set(places) == set(state)
    assert all(torch.equal(checkpoint.tensor(places[name]), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("family", sorted(RENAMED))
def test_a_family_that_is_saved_under_other_names(family: str) -> None:
    """transformers loads it then; nothing is guessed."""
    places, checkpoint = located(tiny_folder(family))
    assert places is None and checkpoint.names != set(tiny(family).state_dict())


def test_tied_weights_are_found_where_they_are() -> None:
    places, checkpoint = located(tiny_folder("llama-tied"))
    assert places is not None and "lm_head.weight" not in checkpoint.names
    assert places["lm_head.weight"] == places["model.embed_tokens.weight"] == "model.embed_tokens.weight"


def test_a_head_that_is_missing_but_not_tied(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "m")
    edit_weights(folder, lambda held: held.pop("lm_head.weight"))
    assert located(folder)[0] is None


@pytest.mark.parametrize("add", [True, False])
def test_names_with_and_without_the_prefix_of_the_base_model(tmp_path: Path, add: bool) -> None:
    """As checkpoints of the bare model have them; and the other way round."""
    folder = own_folder(tmp_path / "m", "llama" if not add else "gpt2")

    def rename(held: dict[str, Tensor]) -> None:
        for name in list(held):
            if add:
                held[name.removeprefix("transformer.")] = held.pop(name)
            elif not name.startswith("lm_head"):
                held[name.removeprefix("model.")] = held.pop(name)

    edit_weights(folder, rename)
    places, checkpoint = located(folder)
    state = tiny("gpt2" if add else "llama").state_dict()
    assert places is not None
    assert all(torch.equal(checkpoint.tensor(places[name]), tensor) for name, tensor in state.items())


def test_names_that_transformers_would_have_to_translate(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "m")
    edit_weights(folder, lambda held: held.update({"model.layers.0.mlp.w1": held.pop("model.layers.0.mlp.up_proj.weight")}))
    assert located(folder)[0] is None


@pytest.mark.parametrize("change", ["shape", "transposed"])
def test_another_shape(tmp_path: Path, change: str) -> None:
    folder, name = own_folder(tmp_path / "m"), "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda held: held.update({name: held[name][:-1].clone() if change == "shape" else held[name].t().contiguous()}))
    assert located(folder)[0] is None


def test_more_than_the_model_needs_is_left(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "m")
    edit_weights(folder, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}))
    places, _ = located(folder)
    assert places is not None and "model.layers.0.self_attn.rotary_emb.inv_freq" not in places.values()
