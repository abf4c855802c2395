from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cloven.bundle.manifest import ExposedGroup, ExposedManifest
from cloven.bundle.placement import parse_part
from cloven.bundle.verification import sha256_file, sha256_matrix
from cloven.errors import BadBundle, BadInput, ClovenError, TamperedBundle
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


# --- parts


def test_products_of_layers(folder: Path) -> None:
    for number in (1, 2, 3):
        matrices = Matrices.load(folder, "cpu", parse_part(f"layers:{number}/3"))
        assert [w is not None for w in matrices.groups] == [index + 1 == number for index in range(3)]
        c = random_residues(5, GROUPS[number - 1].shape[1])
        assert torch.equal(matrices.multiply(number - 1, c), python_product(c, GROUPS[number - 1]))
        assert matrices.bundle.hex() == ExposedManifest.read(folder).bundle


@pytest.mark.parametrize("of", [1, 2, 3, 4])
def test_products_of_rows(tmp_path: Path, of: int) -> None:
    """Together they are the product, in the order of the parts."""
    groups = GROUPS[:2]
    write_exposed(tmp_path / "exposed", groups)
    for index, codes in enumerate(groups):
        c = random_residues(5, codes.shape[1], index)
        answers = [
            Matrices.load(tmp_path / "exposed", "cpu", parse_part(f"rows:{number}/{of}")).multiply(index, c) for number in range(1, of + 1)
        ]
        assert all(answer.shape[1] for answer in answers)
        assert torch.equal(torch.cat(answers, dim=1), python_product(c, codes))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An exposed half with a file for each group."""
    records, hashes = [], {}
    for number, codes in enumerate(GROUPS):
        name = f"exposed-{number}.safetensors"
        save_file({f"group-{number}": codes}, tmp_path / name)
        hashes[name] = sha256_file(tmp_path / name)
        records.append(ExposedGroup(*codes.shape, name, f"group-{number}", sha256_matrix(codes)))
    ExposedManifest(tuple(records), hashes).write(tmp_path)
    return tmp_path


def test_only_the_files_of_a_part_are_needed(files: Path) -> None:
    """A model that is larger than a machine: each has its files and the manifest."""
    (files / "exposed-0.safetensors").unlink()
    (files / "exposed-2.safetensors").write_bytes(b"not fetched completely")
    matrices = Matrices.load(files, "cpu", parse_part("layers:2/3"))
    c = random_residues(2, 7)
    assert torch.equal(matrices.multiply(1, c), python_product(c, GROUPS[1]))
    with pytest.raises(BadBundle, match="exposed-0"):
        Matrices.load(files, "cpu", parse_part("layers:1/3"))
    with pytest.raises(TamperedBundle, match="exposed-2"):
        Matrices.load(files, "cpu", parse_part("layers:3/3"))
    with pytest.raises(ClovenError, match="exposed-"):
        Matrices.load(files, "cpu")


def test_what_is_needed_is_verified(files: Path) -> None:
    content = bytearray((files / "exposed-1.safetensors").read_bytes())
    content[-1] ^= 1
    (files / "exposed-1.safetensors").write_bytes(content)
    Matrices.load(files, "cpu", parse_part("layers:1/3"))
    for text in ("layers:2/3", "layers:2/2", "layers:1/1"):
        with pytest.raises(TamperedBundle, match="exposed-1"):
            Matrices.load(files, "cpu", parse_part(text))


def test_rows_need_every_file(tmp_path: Path) -> None:
    write_exposed(tmp_path / "exposed", GROUPS[:2])
    next((tmp_path / "exposed").glob("*.safetensors")).unlink()
    with pytest.raises(BadBundle, match="safetensors"):
        Matrices.load(tmp_path / "exposed", "cpu", parse_part("rows:1/2"))


@pytest.mark.parametrize(("text", "most"), [("layers:1/4", 3), ("layers:4/4", 3), ("rows:1/2", 1), ("rows:2/2", 1)])
def test_more_parts_than_there_are(folder: Path, text: str, most: int) -> None:
    with pytest.raises(BadInput, match=f"this bundle can be spread over {most} at most"):
        Matrices.load(folder, "cpu", parse_part(text))


def test_minus_128_in_another_parse_part(tmp_path: Path) -> None:
    """A worker answers for what it holds."""
    codes = random_codes(4, 4)
    codes[3, 1] = -128
    write_exposed(tmp_path / "exposed", [codes])
    Matrices.load(tmp_path / "exposed", "cpu", parse_part("rows:1/2"))
    with pytest.raises(BadBundle, match="-128"):
        Matrices.load(tmp_path / "exposed", "cpu", parse_part("rows:2/2"))
