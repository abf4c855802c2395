"""An attention layer whose keys are in the enclave, as the accelerator runs it.

    1. q, k, v = projections of x                       (permuted by their weights in permute mode)
    2. q', k'(, v') from the enclave: normed, rotated, keyed
    3. the cache takes k', v'; attention runs on them   (transformers' own code, which rotates by cos 1 and sin 0)
    4. a from the enclave: the true attention output
    5. o_proj

The family's attention code stays as it is: its projections and its output projection call the enclave, a hook gives it ones and zeros
for cos and sin, and in session mode its heads are ρ dimensions wider (the scale of the softmax stays 1/√d).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cloven.errors import BadInput, NotAttached
from cloven.kv_shield.shapes import AttentionShape
from cloven.model.cache_argument import CACHE_NAMES
from cloven.model.shared_input import SharedInput


class Peer(Protocol):
    """The enclave, as a layer sees it."""

    def require_open(self, cache: Any) -> None:
        """Refuse a cache that is sealed."""

    def key(self, layer: int, x: Tensor, cache: Any) -> Tensor:
        """q ‖ k (‖ v) [B, S, W] -> q' ‖ k' (‖ v')."""

    def restore(self, layer: int, a: Tensor, cache: Any) -> Tensor:
        """a' [B, S, H·(d + ρ)] -> a [B, S, H·d]."""


class KeyedAttention:
    """Puts itself between an attention module and its projections.

    Args:
        model: the model; its modules are changed in place.
        index: the layer's number in the bundle.
        shape: what the bundle says of it.
        noise: ρ; 0 in permute mode.
    """

    def __init__(self, model: nn.Module, index: int, shape: AttentionShape, noise: int) -> None:
        self.index, self.shape, self.noise = index, shape, noise
        self.peer: Peer | None = None
        self._call = threading.local()  # the cache that the current call of the attention module was given
        attention: Any = model.get_submodule(shape.name)
        self._modules = {name: attention.get_submodule(name) for name in (*shape.projections, shape.output)}
        self._plain: list[Callable[[Tensor], Tensor]] = []
        self._shared = SharedInput(self._projected)
        for position, name in enumerate(shape.projections):
            module = self._modules[name]
            self._plain.append(module.forward)
            module.forward = _Projection(self, position)
        self._out: Callable[[Tensor], Tensor] = self._modules[shape.output].forward
        self._modules[shape.output].forward = self._output
        for name in ("q_norm", "k_norm"):
            if getattr(attention, name, None) is not None:
                setattr(attention, name, nn.Identity())  # in the enclave
        if noise:
            attention.head_dim = shape.head_dim + noise
            if hasattr(attention, "split_size"):
                attention.split_size = shape.widths(noise)[0]
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyedAttention:
        """A copy of the model starts without a session."""
        clone = KeyedAttention.__new__(KeyedAttention)
        memo[id(self)] = clone
        clone.index, clone.shape, clone.noise, clone.peer = self.index, self.shape, self.noise, None
        clone._call = threading.local()
        clone._shared = SharedInput(clone._projected)
        clone._modules = copy.deepcopy(self._modules, memo)
        clone._plain = copy.deepcopy(self._plain, memo)
        clone._out = copy.deepcopy(self._out, memo)
        return clone

    def projection(self, position: int, x: Tensor) -> Tensor:
        """The output of one projection: whichever is called first asks for all."""
        return self._shared.output(position, x)

    def _enter(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)
        if cache is None and len(args) > 1 and hasattr(args[1], "get_seq_length"):  # GPT-2 passes it by position
            cache = args[1]
        self._call.cache = cache
        for name, module in self._modules.items():
            if attention.get_submodule(name) is not module:  # what stands there now would work on keyed rows
                raise BadInput(
                    f"{self.shape.name}: its {name} is not the module that was loaded (an adapter?): merge adapters before `prepare`"
                )
        if self.peer is not None:
            self.peer.require_open(cache)
        given = kwargs.get("position_embeddings")
        if given is not None:
            x: Tensor = given[0]
            ones = torch.ones(1, 1, self.shape.head_dim + self.noise, dtype=x.dtype, device=x.device)
            kwargs = {**kwargs, "position_embeddings": (ones, torch.zeros_like(ones))}
        return args, kwargs

    def _projected(self, x: Tensor) -> list[Tensor]:
        peer = self._require_peer()
        parts = [plain(x) for plain in self._plain]
        if len(parts) == 1:
            parts = list(parts[0].split(self.shape.widths(), -1))  # q, k, v
        if self.noise:
            keyed = peer.key(self.index, torch.cat(parts, -1), self._call.cache)
            parts = list(keyed.split(self.shape.widths(self.noise), -1))
        elif self.shape.rotary:
            keyed = peer.key(self.index, torch.cat(parts[:2], -1), self._call.cache)
            parts = [*keyed.split(self.shape.widths()[:2], -1), parts[2]]
        return [torch.cat(parts, -1)] if len(self._plain) == 1 else parts

    def _output(self, a: Tensor) -> Tensor:
        y: Tensor = self._out(self._require_peer().restore(self.index, a, self._call.cache))
        return y

    def _require_peer(self) -> Peer:
        if self.peer is None:
            raise NotAttached(
                f"{self.shape.name}: no enclave is attached: start `cloven enclave`, then set CLOVEN_ENCLAVE before loading, "
                "or call cloven.attach(model, ADDRESS)"
            )
        return self.peer


class _Projection:
    """The forward of one projection."""

    def __init__(self, attention: KeyedAttention, position: int) -> None:
        self._attention, self._position = attention, position

    def __call__(self, x: Tensor) -> Tensor:
        return self._attention.projection(self._position, x)
