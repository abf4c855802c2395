from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloven.bundle import shards
from cloven.bundle.shards import ShardWriter, map_matrix
from cloven.bundle.verification import sha256_file, sha256_matrix
from cloven.errors import BadBundle, BadInput
from tests.helpers import random_codes


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), i, dtype=torch.int8) for i in range(7)}
    tensors["large"] = torch.ones(1000, dtype=torch.int8)  # larger than a shard: a shard of its own
    writer = ShardWriter(tmp_path, "model", secret=False, shard_bytes=250)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    writer.close()  # again: nothing left
    writer.write_index()

    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"model-{i:05d}.safetensors" for i in range(1, 6)] + ["model.safetensors.index.json"]
    assert writer.files == {name: sha256_file(tmp_path / name) for name in files}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index == {"metadata": {"total_size": 1700}, "weight_map": writer.file_of}
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / writer.file_of[name])[name], tensor)
    assert all(sum(t.nbytes for t in load_file(tmp_path / name).values()) <= 250 for name in files[:-1] if name != writer.file_of["large"])


@pytest.mark.parametrize(("secret", "mode"), [(True, 0o600), (False, 0o644)])
def test_modes_from_the_first_byte_on(tmp_path: Path, secret: bool, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        seen.append(path.stat().st_mode & 0o777)
        save_file(tensors, path, **options)
        seen.append(path.stat().st_mode & 0o777)

    monkeypatch.setattr(shards, "save_file", spy)
    writer = ShardWriter(tmp_path, "x", secret=secret)
    writer.add("a", torch.zeros(3))
    writer.close()
    if secret:
        assert seen == [0o600, 0o600]
    assert (tmp_path / "x-00001.safetensors").stat().st_mode & 0o777 == mode


def test_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "x-00001.safetensors").write_text("precious")
    writer = ShardWriter(tmp_path, "x", secret=True)
    writer.add("a", torch.zeros(3))
    with pytest.raises((BadInput, FileExistsError)):
        writer.close()
    assert (tmp_path / "x-00001.safetensors").read_text() == "precious"


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "x", secret=False)
    writer.add("a", torch.zeros(3))
    with pytest.raises(BadInput, match="two tensors are called a"):
        writer.add("a", torch.ones(3))


def test_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    writer = ShardWriter(tmp_path, "x", secret=False)
    writer.add("rows", base[1:])
    writer.add("transposed", base.t())
    writer.add("whole", base)
    writer.add("tied", base)
    writer.close()
    stored = load_file(tmp_path / "x-00001.safetensors")
    expected = {"rows": base[1:], "transposed": base.t(), "whole": base, "tied": base}
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {name: tensor.tolist() for name, tensor in expected.items()}


def test_map_matrix(tmp_path: Path) -> None:
    codes = random_codes(5, 9)
    save_file({"w": codes, "other": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert torch.equal(map_matrix(tmp_path / "x.safetensors", "w", 5, 9), codes)
    assert sha256_matrix(map_matrix(tmp_path / "x.safetensors", "w", 5, 9)) == sha256_matrix(codes)


@pytest.mark.parametrize(("tensor", "rows", "columns"), [("w", 9, 5), ("w", 5, 8), ("w", 45, 1), ("other", 1, 2), ("absent", 5, 9)])
def test_not_that_matrix(tmp_path: Path, tensor: str, rows: int, columns: int) -> None:
    save_file({"w": random_codes(5, 9), "other": torch.zeros(1, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(BadBundle, match=tensor):
        map_matrix(tmp_path / "x.safetensors", tensor, rows, columns)


@pytest.mark.parametrize("content", [None, b"", b"\x08", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_no_shard(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BadBundle, match=r"x\.safetensors"):
        map_matrix(tmp_path / "x.safetensors", "w", 5, 9)
