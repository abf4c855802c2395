from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cloven.bundle.manifest import ExposedGroup, ExposedManifest
from cloven.bundle.verification import sha256_file, sha256_matrix
from cloven.errors import BadBundle, ClovenError, TamperedBundle
from cloven.worker.matrices import Matrices
from tests.helpers import python_product, random_codes, random_residues, write_exposed

GROUPS = [random_codes(4, 16, 1), random_codes(33, 7, 2), random_codes(1, 1, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_exposed(tmp_path / "exposed", GROUPS)
    return tmp_path / "exposed"


def test_products(folder: Path) -> None:
    matrices = Matrices.load(folder, "cpu")
    assert matrices.bundle.hex() == ExposedManifest.read(folder).bundle
    assert len(matrices.groups) == 3
    for number, codes in enumerate(GROUPS):
        c = random_residues(5, codes.shape[1], number)
        z = matrices.multiply(number, c)
        assert z.device.type == "cpu"
        assert torch.equal(z, python_product(c, codes))


def test_a_changed_byte(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(TamperedBundle, match=shard.name):
        Matrices.load(folder, "cpu")


def test_a_missing_shard(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(BadBundle, match="safetensors"):
        Matrices.load(folder, "cpu")


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="cloven prepare"):
        Matrices.load(tmp_path, "cpu")


def test_minus_128(tmp_path: Path) -> None:
    codes = random_codes(4, 4)
    codes[2, 1] = -128
    write_exposed(tmp_path / "exposed", [codes])
    with pytest.raises(BadBundle, match="-128"):
        Matrices.load(tmp_path / "exposed", "cpu")


@pytest.mark.parametrize("tensor", [torch.zeros(4, 5, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.int16), None])
def test_a_shard_that_is_not_what_the_manifest_says(tmp_path: Path, tensor: torch.Tensor | None) -> None:
    save_file({"group-0": tensor} if tensor is not None else {"other": torch.zeros(1)}, tmp_path / "x.safetensors")
    group = ExposedGroup(4, 4, "x.safetensors", "group-0", sha256_matrix(torch.zeros(4, 4, dtype=torch.int8)))
    ExposedManifest((group,), {"x.safetensors": sha256_file(tmp_path / "x.safetensors")}).write(tmp_path)
    with pytest.raises(BadBundle, match="group-0"):
        Matrices.load(tmp_path, "cpu")


def test_a_shard_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    ExposedManifest(
        (ExposedGroup(4, 4, "x.safetensors", "g", "0" * 64),), {"x.safetensors": sha256_file(tmp_path / "x.safetensors")}
    ).write(tmp_path)
    with pytest.raises(BadBundle):
        Matrices.load(tmp_path, "cpu")


def test_a_manifest_of_the_trusted_half(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**record, "format": "cloven-trusted"}), encoding="utf-8")
    with pytest.raises(BadBundle, match="cloven-exposed"):
        Matrices.load(folder, "cpu")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_no_such_device(folder: Path, device: str) -> None:
    with pytest.raises(ClovenError):
        Matrices.load(folder, device)
