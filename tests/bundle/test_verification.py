from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from cloven.bundle import verification
from cloven.bundle.verification import sha256_file, sha256_matrix, verify_files, verify_matrix
from cloven.errors import BadBundle, TamperedBundle
from tests.helpers import random_codes


def test_sha256_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    content = bytes(range(256)) * 5
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(verification, "_BLOCK", 100)  # several blocks
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    with pytest.raises(BadBundle, match="cannot be read"):
        sha256_file(tmp_path / "absent")


def test_sha256_of_a_matrix_is_that_of_its_bytes_in_row_major_order() -> None:
    codes = random_codes(3, 5)
    expected = hashlib.sha256(bytes(value % 256 for row in codes.tolist() for value in row)).hexdigest()
    assert sha256_matrix(codes) == expected
    assert sha256_matrix(codes.t().contiguous().t()) == expected  # whatever the strides
    assert sha256_matrix(codes.t()) != expected


def test_verify_files_names_the_first_that_differs(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    for name in names:
        (tmp_path / name).write_text(name)
    files = {name: sha256_file(tmp_path / name) for name in names}
    verify_files(tmp_path, files)
    (tmp_path / "b").write_text("B")
    with pytest.raises(TamperedBundle, match="/b:"):
        verify_files(tmp_path, files)
    (tmp_path / "b").unlink()
    with pytest.raises(BadBundle, match="/b:"):
        verify_files(tmp_path, files)


def test_every_changed_byte_of_a_matrix_is_seen() -> None:
    codes = random_codes(3, 5)
    expected = sha256_matrix(codes)
    verify_matrix(codes, expected, "here")
    for i in range(15):
        changed = codes.clone()
        changed.view(-1)[i] ^= 1
        with pytest.raises(TamperedBundle, match="here"):
            verify_matrix(changed, expected, "here")


def test_errors_are_security_errors() -> None:
    assert TamperedBundle.exit_code == 3


def test_floats_and_single_elements() -> None:
    assert sha256_matrix(torch.tensor([[1.0]])) == hashlib.sha256(b"\x00\x00\x80\x3f").hexdigest()
