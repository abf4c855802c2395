"""Bundles with --seal-idle, and caches of every kind for them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache, StaticCache

import cloven
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.preallocated import PreallocatedCache
from cloven.kv_shield.prepare import prepare_kv_shield
from cloven.kv_shield.session import KvSession
from cloven.model.cache_argument import with_cache
from tests.kv_bundles import Attached, enclave, load
from tests.split_models import scratch, tiny

ROOM = 64  # rows of preallocated and static caches
PROMPT = 11
KINDS = {
    "dynamic": lambda config: DynamicCache(config=config),
    "preallocated": lambda config: PreallocatedCache(config, ROOM),
    "static": lambda config: StaticCache(config=config, max_cache_len=ROOM),
}


@functools.cache
def sealing_bundle(family: str, mode: str) -> Path:
    """OUT of a tiny model; not to be changed on disk."""
    out = scratch() / f"kv-{family}-{mode}-seal"
    prepare_kv_shield(tiny(family), out, KvShieldConfig(mode, seal_idle=True))
    return out


@contextlib.contextmanager
def attached_sealing(family: str, mode: str) -> Iterator[Attached]:
    """A loaded model with an enclave in a thread."""
    out = sealing_bundle(family, mode)
    with enclave(out / "trusted") as (address, server):
        model = load(out)
        session = cloven.attach(model, address, timeout=10)
        assert isinstance(session, KvSession)
        with session:
            yield Attached(family, mode, model, session, server, tiny(family))


def greedy_ids(model: Any, ids: Tensor, tokens: int, cache: Any = None) -> Tensor:
    """Exactly so many new tokens: [1, T + tokens]."""
    output: Tensor = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **with_cache(cache), pad_token_id=0)
    return output
