"""The trusted side's own copy: verified bytes are the bytes used; a foreign or missing copy is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cloven.bundle.bundle import open_bundle
from cloven.bundle.exposed_copy import ExposedCopy
from cloven.errors import BadBundle, ForeignBundle, TamperedBundle
from tests.split_models import tiny_bundle


def damage(path: Path) -> None:
    """Change the last byte: a code of the last group."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def copied(tmp_path: Path, family: str = "llama") -> Path:
    shutil.copytree(tiny_bundle(family).path, tmp_path / "out")
    return tmp_path / "out"


def test_verified_and_mapped_agree(tmp_path: Path) -> None:
    bundle = open_bundle(copied(tmp_path))
    copy = ExposedCopy(bundle.exposed, bundle.manifest)
    for index, group in enumerate(bundle.manifest.exposed.groups):
        verified = copy.verified(index)
        assert verified.shape == (group.rows, group.columns) and torch.equal(verified, copy.mapped(index))


def test_verified_bytes_do_not_follow_the_file(tmp_path: Path) -> None:
    bundle = open_bundle(copied(tmp_path))
    last = len(bundle.manifest.exposed.groups) - 1
    verified = ExposedCopy(bundle.exposed, bundle.manifest).verified(last)
    before = verified.clone()
    damage(bundle.exposed / "exposed-00001.safetensors")
    assert torch.equal(verified, before)


def test_a_changed_byte_names_the_file(tmp_path: Path) -> None:
    bundle = open_bundle(copied(tmp_path))
    damage(bundle.exposed / "exposed-00001.safetensors")
    copy = ExposedCopy(bundle.exposed, bundle.manifest)
    with pytest.raises(TamperedBundle, match="exposed-00001"):
        for index in range(len(bundle.manifest.exposed.groups)):
            copy.verified(index)


def test_another_bundles_half_names_both_ids(tmp_path: Path) -> None:
    bundle, other = open_bundle(copied(tmp_path)), tiny_bundle("qwen2")
    with pytest.raises(ForeignBundle) as caught:
        ExposedCopy(other.exposed, bundle.manifest)
    assert bundle.id in str(caught.value) and other.id in str(caught.value)


def test_a_missing_copy_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="--exposed"):
        ExposedCopy(tmp_path / "nowhere", tiny_bundle("llama").manifest)
