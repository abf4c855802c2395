"""SHA-256 of files and matrices, compared with what a manifest promises. Verification raises; it never returns a bool."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloven.errors import BadBundle, TamperedBundle

_BLOCK = 8 * 2**20


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise BadBundle(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def sha256_matrix(matrix: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes, hexadecimal."""
    buffer: Any = matrix.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(buffer)).hexdigest()


def verify_bytes(data: bytes, expected: str, path: Path) -> None:
    """Require that a file's bytes, read already, have their SHA-256: the bytes checked are the bytes used.

    Raises:
        TamperedBundle: they have not.
    """
    if hashlib.sha256(data).hexdigest() != expected:
        raise TamperedBundle(f"{path}: the file's bytes differ from what the manifest promises; copy it again")


def verify_files(folder: Path, files: dict[str, str]) -> None:
    """Require that every listed file has its SHA-256.

    Raises:
        TamperedBundle: names the first file that differs.  BadBundle: a file is missing.
    """
    for name, expected in files.items():
        if sha256_file(folder / name) != expected:
            raise TamperedBundle(f"{folder / name}: the file's bytes differ from what the manifest promises; copy it again")


def verify_matrix(matrix: Tensor, expected: str, where: str) -> None:
    """Require that a matrix in memory has the SHA-256 of the manifest: the bytes checked are the bytes used."""
    if sha256_matrix(matrix) != expected:
        raise TamperedBundle(f"{where}: the matrix's bytes differ from what the trusted manifest promises")
