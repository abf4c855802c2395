"""Safetensors shards: written as tensors come, read by memory map."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cloven.bundle.verification import sha256_file
from cloven.errors import BadBundle, BadInput, RunError

SHARD_BYTES = 2**30  # well below the 5 GB that the format allows: a shard is held in memory until it is written


class ShardWriter:
    """Collects tensors and writes them as `{stem}-00001.safetensors`, … of at most `shard_bytes` (one larger tensor: alone).

    Args:
        folder: an existing folder.
        stem: beginning of the file names.
        secret: files get mode 0600 from their first byte on; 0644 otherwise.
    """

    def __init__(self, folder: Path, stem: str, *, secret: bool, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._stem, self._secret, self._shard_bytes = folder, stem, secret, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._written = 0
        self.total_bytes = 0
        self.file_of: dict[str, str] = {}
        self.files: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; a full shard goes to disk first."""
        if name in self.file_of:
            raise BadInput(f"two tensors are called {name}")
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().contiguous()
        self._pending_bytes += tensor.nbytes
        self.file_of[name] = f"{self._stem}-{self._written + 1:05d}.safetensors"

    def close(self) -> None:
        """Write what is left."""
        if self._pending:
            self._flush()

    def write_index(self) -> None:
        """Write the index that transformers reads: `{stem}.safetensors.index.json`."""
        name = f"{self._stem}.safetensors.index.json"
        write_index(self._folder / name, self.file_of, self.total_bytes)
        self.files[name] = sha256_file(self._folder / name)

    def _flush(self) -> None:
        name = f"{self._stem}-{self._written + 1:05d}.safetensors"
        if (self._folder / name).exists():
            raise FileExistsError(f"{name} is there already")
        self.files[name] = write_shard(self._folder / name, self._pending, secret=self._secret)
        self.total_bytes += self._pending_bytes
        self._written += 1
        self._pending.clear()
        self._pending_bytes = 0


def write_index(path: Path, file_of: dict[str, str], total_bytes: int) -> None:
    """Write the index of a sharded checkpoint: the file of every tensor, by name."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
    path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_shard(path: Path, tensors: dict[str, Tensor], *, secret: bool, metadata: dict[str, str] | None = None) -> str:
    """Write one file, durably, that is there complete or not at all; what an earlier attempt left is replaced.

    Args:
        secret: mode 0600 from the first byte on; 0644 otherwise.

    Returns:
        Its SHA-256.

    Raises:
        RunError: the disk is full, say.
    """
    mode = 0o600 if secret else 0o644
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        save_file(_separate(tensors), partial, metadata={"format": "pt", **(metadata or {})})
    except (OSError, SafetensorError) as error:
        raise RunError(f"writing {path.name} failed: {error}") from error
    partial.chmod(mode)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    digest = sha256_file(partial)
    partial.replace(path)
    return digest


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none sharing memory with another or with something larger: safetensors refuses those."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, given in tensors.items():
        tensor = given.detach().contiguous()
        storage = tensor.untyped_storage()
        result[name] = tensor.clone() if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen else tensor
        seen.add(storage.data_ptr())
    return result


def map_matrix(path: Path, tensor: str, rows: int, columns: int) -> Tensor:
    """Memory-map an int8 matrix of a shard.

    Returns:
        int8 [rows, columns], backed by the file: its pages are not this process's own memory. Not verified.

    Raises:
        BadBundle: no such file or tensor, or another shape or dtype.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            matrix: Tensor = shard.get_tensor(tensor)
    except (OSError, SafetensorError) as error:
        raise BadBundle(f"{path}: cannot read {tensor}: {error}") from error
    if matrix.dtype != torch.int8 or tuple(matrix.shape) != (rows, columns):
        raise BadBundle(f"{path}: {tensor} is {matrix.dtype} {tuple(matrix.shape)}, the manifest says int8 ({rows}, {columns})")
    return matrix
