"""A reference to the public base model: a hash over its tensors, not its files, so that resharding changes nothing.

sha256 over, for every tensor in the order of names:  JSON [name, dtype, shape] ‖ newline ‖ bytes
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cloven.errors import BadInput, ForeignBundle

_DOMAIN = b"cloven/base/1\n"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory.

    Raises:
        BadInput: there are none, or the index is malformed.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError as error:
        raise BadInput(f"{folder}: no model.safetensors: the base must be a model directory with safetensors files") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"{index}: not a readable index") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise BadInput(f"{index}: names a file elsewhere")
    return [folder / name for name in names]


def base_sha256(folder: Path) -> str:
    """The hash of the model in a directory.

    Raises:
        BadInput: no such files, or unreadable ones.
    """
    where: dict[str, Path] = {}
    digest = hashlib.sha256(_DOMAIN)
    try:
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        for name in sorted(where):
            with safe_open(where[name], framework="pt") as file:
                tensor = file.get_tensor(name).contiguous()
                digest.update(json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode() + b"\n")
                data: Any = tensor.flatten().view(torch.uint8).numpy()
                digest.update(memoryview(data))
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{folder}: the base's weights cannot be read: {error}") from error
    return digest.hexdigest()


def require_base(folder: Path, expected: str) -> None:
    """Require that a directory holds the base that the adapter was prepared for.

    Raises:
        ForeignBundle: another one.
    """
    found = base_sha256(folder)
    if found != expected:
        raise ForeignBundle(
            f"{folder}: these are not the weights of the base that the adapter was made for "
            f"(sha256 over tensors {found[:16]}…, expected {expected[:16]}…)"
        )
