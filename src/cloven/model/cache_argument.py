"""What transformers calls a KV cache: `past_key_values` up to 5.23, `cache` since."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
_NAME = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)


def with_cache(cache: Any) -> dict[str, Any]:
    """The argument of a model's call, or of `generate`, that gives it a cache."""
    return {_NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache that a model's output holds."""
    return getattr(output, _NAME)
