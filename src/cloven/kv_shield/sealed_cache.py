"""Sealing on the accelerator's side: any transformers `Cache` becomes blocks of ciphertext, and its memory is overwritten.

    1. every tensor of every layer, block by block, to the enclave; the answers are kept
    2. when all are there, of one sealing: the tensors' storage is overwritten with zeros, and the cache is emptied
    3. resuming decrypts the blocks in order into new tensors

Guarantee: see `cloven.kv_shield.vault`; after step 2 the cache's own memory holds none of its rows. Not covered: copies that others made.
A cache that grows by concatenation leaves its earlier states in freed memory: use `PreallocatedCache`. Rows pass through message
buffers and temporaries, whose freed memory is not overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cloven.errors import BadInput, RunError, WorkerRefused
from cloven.kv_shield.messages import MAX_BLOCK_BYTES, TAG_BYTES, Label

_PLAIN = (int, float, str, torch.dtype, torch.device, type(None))  # what a layer may hold besides rows


class Sealer(Protocol):
    """The enclave, as sealing sees it."""

    def seal_block(self, label: Label, data: memoryview) -> tuple[bytes, int]:
        """Ciphertext of a block, and the epoch of its sealing."""

    def end_seal(self, blocks: int) -> int:
        """The epoch of the sealing that is complete."""

    def unseal_block(self, label: Label, epoch: int, data: memoryview) -> tuple[memoryview, int]:
        """Plaintext of a block, and how many are left."""


@dataclass(frozen=True)
class SealedCache:
    """What is left of a cache: ciphertext. Keep it anywhere; only the enclave that sealed it can resume it, in this order, once."""

    cache: Any
    epoch: int
    blocks: tuple[tuple[Label, bytes], ...]

    def __repr__(self) -> str:
        return f"SealedCache(epoch={self.epoch}, {len(self.blocks)} blocks, {sum(len(data) for _, data in self.blocks):,} bytes)"


def seal(sealer: Sealer, cache: Any) -> SealedCache:
    """Steps 1 and 2.

    Raises:
        BadInput: a layer holds something else than tensors that can be read back.
        RunError: the sealing began anew on the way, as after a lost connection; the cache is as it was.
    """
    blocks: list[tuple[Label, bytes]] = []
    epochs: set[int] = set()
    tensors = list(_tensors(cache))
    for layer, part, tensor in tensors:
        data = _bytes(tensor)
        for start in range(0, len(data), MAX_BLOCK_BYTES):
            label = Label(layer, part, len(blocks), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            ciphertext, epoch = sealer.seal_block(label, data[start : start + MAX_BLOCK_BYTES])
            blocks.append((label, ciphertext))
            epochs.add(epoch)
    _require_one(epochs)  # before the end: a sealing that has ended can only be resumed
    epochs.add(sealer.end_seal(len(blocks)))
    _require_one(epochs)
    for layer, part, tensor in tensors:
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).zero_()
        setattr(cache.layers[layer], part, tensor.new_empty(0))
    return SealedCache(cache, epochs.pop(), tuple(blocks))


def resume(sealer: Sealer, sealed: SealedCache) -> Any:
    """Step 3: the same cache object, with its tensors back."""
    _require_whole(sealed)
    restored: dict[tuple[int, str], tuple[Label, bytearray]] = {}
    left = 1
    for label, data in sealed.blocks:
        plain, left = sealer.unseal_block(label, sealed.epoch, memoryview(data))
        restored.setdefault((label.layer, label.part), (label, bytearray()))[1].extend(plain)
    if left:
        raise WorkerRefused("the sealed cache has lost blocks at its end: it stays sealed")
    for (layer, part), (label, rows) in restored.items():
        place = getattr(sealed.cache.layers[layer], part)
        tensor = torch.frombuffer(rows, dtype=getattr(torch, label.dtype)).view(label.shape).to(place.device)
        setattr(sealed.cache.layers[layer], part, tensor)
    return sealed.cache


def _tensors(cache: Any) -> Iterator[tuple[int, str, Tensor]]:
    """Every tensor that holds rows: (layer, attribute, tensor)."""
    for number, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.numel() > 1:
                yield number, name, value
            elif not isinstance(value, _PLAIN) and not (isinstance(value, Tensor) and value.numel() <= 1):
                raise BadInput(f"a cache of {type(layer).__name__} cannot be sealed: it keeps {name} as {type(value).__name__}")


def _require_one(epochs: set[int]) -> None:
    """Refuse ciphertext of several sealings, of which the enclave resumes the last alone: nothing has been overwritten yet."""
    if len(epochs) > 1:
        raise RunError("the connection was lost and the enclave began the sealing anew: the cache is as it was, seal it again")


def _require_whole(sealed: SealedCache) -> None:
    """Refuse a list of blocks that cannot be one sealing of this cache, before the enclave is asked."""
    sizes: dict[tuple[int, str], tuple[Label, int]] = {}
    for number, (label, data) in enumerate(sealed.blocks):
        known = label.block == number and label.layer < len(sealed.cache.layers) and hasattr(sealed.cache.layers[label.layer], label.part)
        if not known or not isinstance(getattr(torch, label.dtype, None), torch.dtype):
            raise WorkerRefused(f"block {number} of the sealed cache is not its block {number}: it stays sealed")
        before = sizes.get((label.layer, label.part), (label, 0))[1]
        sizes[label.layer, label.part] = (label, before + len(data) - TAG_BYTES)
    for label, size in sizes.values():
        if size != math.prod(label.shape) * getattr(torch, label.dtype).itemsize:
            raise WorkerRefused(f"layer {label.layer} of the sealed cache has lost blocks: it stays sealed")


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(data).cast("B")
