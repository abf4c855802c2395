"""The key of a split: all randomness of scramble, decoy and sketches is HKDF(key, group).

    {format, version, key, parameters, model}        trusted/split.key, mode 0600, written before anything else

With the key the same model and the same parameters give the same bundle, bit for bit: an interrupted preparation goes on, and a lost half
is made again. Anything else under one key is refused: the difference of two exposed halves of one model that differ in the decoy or in
the ranks gives the secret row space away.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cloven.errors import BadInput
from cloven.field.prg import KEY_BYTES, SecretStream

SPLIT_KEY = "split.key"
_FORMAT, _VERSION = "cloven-split-key", 2  # 1: keys of scrambles that are broken
_MAX_BYTES = 65_536


@dataclass(frozen=True)
class SplitKey:
    """A key, and the only thing that it may be used for.

    Args:
        key: 32 secret bytes, hexadecimal.
        parameters: the split's parameters.
        model: fingerprint of the matrices that were split; "" until they have been read.
    """

    key: str
    parameters: dict[str, Any]
    model: str = ""

    def __repr__(self) -> str:
        return "SplitKey(<secret>)"

    @classmethod
    def fresh(cls, parameters: dict[str, Any]) -> SplitKey:
        """A key from the operating system."""
        return cls(secrets.token_hex(KEY_BYTES), parameters)

    def stream(self, group: int) -> SecretStream:
        """The randomness of one group."""
        return SecretStream(bytes.fromhex(self.key), f"slip/group/{group}")

    def used_for(self, parameters: dict[str, Any]) -> SplitKey:
        """This key, if it was made for these parameters.

        Raises:
            BadInput: it was not; says which differ.
        """
        differing = sorted(name for name in {*parameters, *self.parameters} if parameters.get(name) != self.parameters.get(name))
        if differing:
            what = ", ".join(f"{name} {self.parameters.get(name)!r}" for name in differing)
            raise BadInput(f"this key belongs to a split with {what}: two different splits under one key give the secret part away")
        return self

    def bound_to(self, model: str) -> SplitKey:
        """This key, bound to a model.

        Raises:
            BadInput: it was bound to another one.
        """
        if self.model not in ("", model):
            raise BadInput("this key belongs to a split of another model, or of another version of its weights")
        return replace(self, model=model)

    def write(self, path: Path) -> None:
        """Write durably, mode 0600 from the first byte on."""
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "version": _VERSION, **asdict(self)}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def read_split_key(path: Path) -> SplitKey:
    """Read and check a key file.

    Raises:
        BadInput: there is none, or it is malformed.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MAX_BYTES else None
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such key file; an earlier bundle has it in OUT/trusted/{SPLIT_KEY}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as a key file") from error
    if not isinstance(record, dict):
        raise BadInput(f"{path}: not a key file")
    valid = (
        set(record) == {"format", "version", "key", "parameters", "model"}
        and (record["format"], record["version"]) == (_FORMAT, _VERSION)
        and isinstance(record["key"], str)
        and len(record["key"]) == 2 * KEY_BYTES
        and all(digit in "0123456789abcdef" for digit in record["key"])
        and isinstance(record["parameters"], dict)
        and isinstance(record["model"], str)
    )
    if not valid:
        raise BadInput(f"{path}: not a key file of this version of cloven")
    return SplitKey(record["key"], record["parameters"], record["model"])
