"""The adapter server's messages: see `cloven.wire.schema` for what all wires share.

    query      {v, type, id, bundle, group, rows} + c  -> answer           {v, type, id, rows} + q
    encrypted  {v, type, id, bundle, group} + row      -> encrypted_answer {v, type, id} + ciphertexts

c is [rows, D], int32 centred residues: LWE samples. q is [rows, N]: z = W' c mod p, of every residue the highest b of 31 bits,
⌊z / 2^(31−b)⌋: int8 for b = 8, else int16. Little-endian, row-major. Every request is complete in itself.
`encrypted` is one row for the fhe backend, with the client's public key. Queries over a lane have no headers, see `cloven.wire.schema`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloven.field.residues import H
from cloven.wire.schema import SERVES, MalformedMessage, Schema, valid_count


@dataclass(frozen=True)
class Query:
    """Asks for the product with the matrix of a group; c follows as a frame."""

    id: int
    bundle: bytes
    group: int
    rows: int


@dataclass(frozen=True)
class Answer:
    """q follows as a frame."""

    id: int
    rows: int


@dataclass(frozen=True)
class Encrypted:
    """Asks for the encrypted product of one row (fhe); public key and ciphertexts follow as a frame."""

    id: int
    bundle: bytes
    group: int


@dataclass(frozen=True)
class EncryptedAnswer:
    """Ciphertexts follow as a frame."""

    id: int


def _valid(name: str, value: object) -> bool:
    return valid_count(value, lowest=1 if name == "rows" else 0)  # group, rows


ADAPTER = Schema(
    {"query": Query, "answer": Answer, "encrypted": Encrypted, "encrypted_answer": EncryptedAnswer, **SERVES},
    (Query, Answer, Encrypted, EncryptedAnswer),
    _valid,
)


OUT_OF_RANGE = "an answer with numbers out of range"


def _dtype(bits: int) -> str:
    return "i1" if bits == 8 else "<i2"


def answer_bytes(rows: int, width: int, bits: int) -> int:
    """The size of an answer's payload."""
    return np.dtype(_dtype(bits)).itemsize * rows * width


def rounded(z: Tensor, bits: int) -> memoryview:
    """The payload of an answer: residues int32 [M, N], rounded without fresh noise, which would average out."""
    q: Any = np.ascontiguousarray((z.numpy() >> (31 - bits)).astype(_dtype(bits)))
    return memoryview(q).cast("B")


def unrounded(frame: memoryview, rows: int, width: int, bits: int) -> Tensor:
    """The middles of the intervals that an answer names: int32 residues [rows, width].

    Raises:
        MalformedMessage: wrong size, or numbers of more than `bits` bits.
    """
    expected = answer_bytes(rows, width, bits)
    if frame.nbytes != expected:
        raise MalformedMessage("size", f"an answer of {frame.nbytes} bytes, expected {expected}")
    q = np.frombuffer(frame, _dtype(bits)).reshape(rows, width).astype(np.int32)
    half = 2 ** (bits - 1)
    if q.size and (q.min() < -half or q.max() >= half):
        raise MalformedMessage("size", OUT_OF_RANGE)
    middle = (q << (31 - bits)) + (1 << (30 - bits))
    return torch.from_numpy(np.clip(middle, -H, H))
