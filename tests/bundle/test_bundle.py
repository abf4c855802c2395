"""Opening a bundle: both halves, one id."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cloven.bundle.bundle import open_bundle
from cloven.errors import BadBundle, ForeignBundle, TamperedBundle
from tests.split_models import tiny_bundle


def test_open_and_verify(tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle("llama").path, tmp_path / "out")
    bundle = open_bundle(tmp_path / "out")
    bundle.verify()
    assert len(bundle.id) == 32 and bundle.trusted.name == "trusted" and bundle.exposed.name == "exposed"


@pytest.mark.parametrize("name", ["trusted/config.json", "exposed/exposed-00001.safetensors", "trusted/model-00001.safetensors"])
def test_verify_names_the_changed_file(tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_bundle("llama").path, tmp_path / "out")
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(TamperedBundle, match=path.name):
        open_bundle(tmp_path / "out").verify()


def test_halves_of_two_bundles(tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle("llama").trusted, tmp_path / "out" / "trusted")
    shutil.copytree(tiny_bundle("qwen2").exposed, tmp_path / "out" / "exposed")
    with pytest.raises(ForeignBundle, match=tiny_bundle("llama").id):
        open_bundle(tmp_path / "out")


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="cloven prepare"):
        open_bundle(tmp_path)
