from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cloven.errors import BadInput
from cloven.kv_shield.preallocated import PreallocatedCache
from cloven.model.cache_argument import with_cache
from tests.kv_bundles import ids_of, random_rows
from tests.kv_shield.sealing import greedy_ids
from tests.split_models import tiny

CONFIG = tiny("llama").config


def cache_of(length: int, batch: int = 1) -> tuple[PreallocatedCache, Tensor]:
    """A cache with 5 rows in layer 0, and these rows."""
    cache, rows = PreallocatedCache(CONFIG, length), random_rows(batch, 2, 5, 12)
    cache.update(rows, 2 * rows, 0)
    return cache, rows


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "phi3", "gpt2"])
def test_the_text_is_that_of_a_dynamic_cache(family: str) -> None:
    model, ids = tiny(family), ids_of(2, 7)
    dynamic, preallocated = DynamicCache(config=model.config), PreallocatedCache(model.config, 40)
    expected = greedy_ids(model, ids, 20, dynamic)
    assert torch.equal(greedy_ids(model, ids, 20, preallocated), expected)
    assert preallocated.get_seq_length() == 26  # the last token was not fed back
    assert torch.equal(greedy_ids(model, expected, 5, preallocated), greedy_ids(model, ids, 25))


def test_rows_stay_where_they_are() -> None:
    cache, rows = cache_of(20)
    layer: Any = cache.layers[0]
    place, whole = layer.keys.data_ptr(), layer.keys.untyped_storage().nbytes()
    more = random_rows(1, 2, 3, 12, seed=1)
    for step in range(3):
        keys, values = cache.update(more, -more, 0)
        assert keys.data_ptr() == place and keys.shape[-2] == values.shape[-2] == 5 + 3 * (step + 1) == cache.get_seq_length()
    assert torch.equal(layer.keys, torch.cat([rows, more, more, more], 2)) and torch.equal(layer.values[:, :, 5:8], -more)
    assert layer.keys.untyped_storage().nbytes() == whole == 2 * 20 * 12 * 4
    assert not layer.keys.as_strided((1, 2, 20, 12), layer.keys.stride())[:, :, 14:].any()  # nothing behind the last row


def test_room_for_exactly_so_many_rows() -> None:
    cache, rows = cache_of(8)
    cache.update(rows[:, :, :3], rows[:, :, :3], 0)
    with pytest.raises(BadInput, match="the cache has room for 8 rows, not for 9"):
        cache.update(rows[:, :, :1], rows[:, :, :1], 0)
    assert cache.get_seq_length() == 8
    with pytest.raises(BadInput, match="room for 4 rows, not for 5"):
        cache_of(4)


def test_a_text_that_outgrows_it() -> None:
    with pytest.raises(BadInput, match="the cache has room for 10 rows, not for 11"):
        greedy_ids(tiny("llama"), ids_of(1, 7), 10, PreallocatedCache(CONFIG, 10))


def test_another_batch_size() -> None:
    cache, _ = cache_of(20)
    rows = random_rows(2, 2, 1, 12)
    with pytest.raises(BadInput, match="the cache holds 1 sequences, not 2"):
        cache.update(rows, rows, 0)


def test_copies_for_beams_are_refused() -> None:
    cache, _ = cache_of(20)
    with pytest.raises(BadInput, match="no beam search"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(BadInput, match="no beam search"):
        cache.batch_select_indices(torch.tensor([0]))


def test_no_beam_search() -> None:
    with pytest.raises(BadInput, match="no beam search"):
        tiny("llama").generate(
            ids_of(1, 4), max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0, **with_cache(PreallocatedCache(CONFIG, 20))
        )


@pytest.mark.parametrize("length", [0, -1])
def test_lengths_that_make_no_sense(length: int) -> None:
    with pytest.raises(BadInput, match=f"a cache for {length} rows: give 1 or more"):
        PreallocatedCache(CONFIG, length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_dtype_is_kept(dtype: torch.dtype) -> None:
    cache, rows = PreallocatedCache(CONFIG, 9), random_rows(1, 2, 4, 12, dtype=dtype)
    keys, values = cache.update(rows, rows, 1)
    assert keys.dtype == values.dtype == dtype and torch.equal(keys, rows)


def test_cropping_makes_room_again() -> None:
    cache, rows = cache_of(6)
    cache.layers[0].crop(-2)
    keys, _ = cache.update(rows[:, :, :3], rows[:, :, :3], 0)
    assert torch.equal(keys, torch.cat([rows[:, :, :3], rows[:, :, :3]], 2))
