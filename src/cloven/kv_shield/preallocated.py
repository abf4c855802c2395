"""A cache that never moves: rows are written into memory that is there from the start, so that sealing finds every one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from cloven.errors import BadInput


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer: keys and values are views of memory for `length` rows."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, once the shapes are known."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self._length, states.shape[3])[..., :0, :] for states in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new rows behind the old ones.

        Raises:
            BadInput: there is no room, or another batch size.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = (_appended(old, new, self._length) for old, new in ((self.keys, key_states), (self.values, value_states)))
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: it would copy."""
        raise BadInput("a preallocated cache keeps its rows: no beam search")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: it would copy."""
        raise BadInput("a preallocated cache keeps its rows: no beam search")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: it would copy."""
        raise BadInput("a preallocated cache keeps its rows: no beam search")


def _appended(old: Tensor, new: Tensor, length: int) -> Tensor:
    first, last = old.shape[-2], old.shape[-2] + new.shape[-2]
    if last > length:
        raise BadInput(f"the cache has room for {length} rows, not for {last}")
    if old.shape[:2] != new.shape[:2]:
        raise BadInput(f"the cache holds {old.shape[0]} sequences, not {new.shape[0]}")
    if old.untyped_storage().nbytes() < length * new[..., :1, :].numel() * new.element_size():  # resumed: only its rows came back
        fresh = new.new_zeros(*old.shape[:2], length, new.shape[3])
        fresh[..., :first, :] = old
        torch.empty(0, dtype=torch.uint8, device=old.device).set_(old.untyped_storage()).zero_()
        old = fresh[..., :first, :]
    whole = old.as_strided((*old.shape[:2], length, old.shape[3]), old.stride())
    whole[..., first:last, :] = new
    return whole[..., :last, :]


class PreallocatedCache(Cache):  # type: ignore[misc]
    """For `generate(cache=…)` (`past_key_values=…` in transformers 5.23), where an idle cache will be sealed.

    Args:
        config: the model's configuration.
        length: rows that it has room for.
    """

    def __init__(self, config: PretrainedConfig, length: int) -> None:
        if length < 1:
            raise BadInput(f"a cache for {length} rows: give 1 or more")
        super().__init__(layers=[PreallocatedLayer(length) for _ in range(config.get_text_config(decoder=True).num_hidden_layers)])
