"""Adapted linears as the client runs them.

    y = W x + V v                    W x   the public base, here
                                     v     = C x, from the adapter server: one query for all linears that share x
    v = Σ over the two terms of scale · (W_int x_int / α)

Parties: the client holds the base, V [N, r], scales and the hint; the server holds C. The base's own products run while the server answers.
A forward pass in which not every adapted group ran is an error: something took the adapter off, and the text would be the base's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cloven.errors import BadBundle, NotAttached, RunError
from cloven.model.linears import is_linear
from cloven.model.shared_input import SharedInput
from cloven.private_lora.config import TERMS
from cloven.private_lora.manifest import ClientGroup

Product = Callable[[Tensor, Callable[[], None]], Tensor]


def deltas(y: Tensor, scales: Tensor, bases: list[Tensor]) -> list[Tensor]:
    """V v of every module, float32 [M, N_i], from the unscaled integer products y float64 [M, 2R]."""
    terms = (y.numpy() * scales.numpy()).reshape(len(y), TERMS, y.shape[1] // TERMS)  # NumPy: less time than PyTorch's for one row
    v = torch.from_numpy(terms.sum(1)).float()  # [M, R]
    parts = v.split([basis.shape[1] for basis in bases], dim=1)
    return [nn.functional.linear(part, basis) for part, basis in zip(parts, bases, strict=True)]


class AdaptedGroup:
    """Puts itself between the linears of a group and their callers; the modules stay, and so do their weights.

    Args:
        model: the base; its modules' `forward` is replaced.
        index: the group's number in the bundle.
        group: what the bundle says of it.
        scales: float64 [2R] of the integer rows: first terms of all modules, then remainders.
        bases: V of every module, float32 [N, r].
        runs: what has run in the current forward pass.

    Raises:
        BadBundle: the model has no such linears.
    """

    def __init__(self, model: nn.Module, index: int, group: ClientGroup, scales: Tensor, bases: list[Tensor], runs: Runs) -> None:
        self.index, self.group, self.name = index, group, group.name
        self._scales, self._bases = scales, bases
        self._product: Product | None = None
        self._runs = runs
        self._shared = SharedInput(self._compute)
        self._plain: list[Callable[[Tensor], Tensor]] = []
        self.modules = [_linear(model, module.name) for module in group.modules]
        for position, linear in enumerate(self.modules):
            self._plain.append(linear.forward)
            linear.forward = _Adapted(self, position)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedGroup:
        """A copy of the model starts without a session: masks and connections are not copied."""
        clone = AdaptedGroup.__new__(AdaptedGroup)
        memo[id(self)] = clone
        clone.index, clone.group, clone.name, clone._product = self.index, self.group, self.name, None
        clone._scales, clone._bases = self._scales, self._bases
        clone._runs = copy.deepcopy(self._runs, memo)
        clone._shared = SharedInput(clone._compute)
        clone._plain = copy.deepcopy(self._plain, memo)
        clone.modules = copy.deepcopy(self.modules, memo)
        return clone

    def output(self, position: int, x: Tensor) -> Tensor:
        """The output of one linear: whichever is called first asks for all."""
        y = self._shared.output(position, x)
        if torch.is_grad_enabled() and x.requires_grad:
            y = _NoGradient.apply(x, y)  # type: ignore[no-untyped-call]
        return y

    def remove(self) -> None:
        """Give the linears back their own forward."""
        for linear, plain in zip(self.modules, self._plain, strict=True):
            linear.forward = plain

    def attach(self, product: Product) -> None:
        """Use `product(x, meanwhile)`: float64 [M, K] -> float64 [M, 2R], unscaled, for all later calls."""
        self._product = product

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _compute(self, x: Tensor) -> list[Tensor]:
        if self._product is None:
            raise NotAttached(
                f"{self.name}: no adapter server is attached: start `cloven adapter-server`, then set CLOVEN_SERVER before loading, "
                "or call cloven.attach(model, ADDRESS)"
            )
        outputs: list[Tensor] = []
        rows = x.detach().reshape(-1, x.shape[-1]).cpu().double()  # [..., K] -> [M, K]
        y = self._product(rows, lambda: outputs.extend(plain(x) for plain in self._plain))
        for output, delta in zip(outputs, deltas(y, self._scales, self._bases), strict=True):
            output += delta.to(output.device, output.dtype).view(output.shape)
        self._runs.groups.add(self.index)
        return outputs


class _NoGradient(torch.autograd.Function):
    """Lets a result pass, and refuses to go back: the gradient through the adapter is not known here."""

    @staticmethod
    def forward(_context: Any, x: Tensor, y: Tensor) -> Tensor:
        del x
        return y.view_as(y)

    @staticmethod
    def backward(_context: Any, *_: Any) -> Any:
        raise RunError("an adapted model cannot be trained: gradients do not pass through the adapter, which is at its server")


class Runs(threading.local):
    """Which groups have run in this thread's current forward pass."""

    def __init__(self) -> None:
        self.groups: set[int] = set()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Runs:
        return Runs()


class Watch:
    """Hooks on the model: every group must run in every forward pass."""

    def __init__(self, model: nn.Module, names: list[str], runs: Runs) -> None:
        self._names, self._runs = names, runs
        model.register_forward_pre_hook(self.start)
        model.register_forward_hook(self.finish)

    def start(self, *_: Any) -> None:
        """Before the forward pass."""
        self._runs.groups.clear()

    def finish(self, *_: Any) -> None:
        """After it.

        Raises:
            RunError: a group did not run.
        """
        for index, name in enumerate(self._names):
            if index not in self._runs.groups:
                raise RunError(f"{name}: the adapter was not asked: its linears were replaced or reset after `adapt`; adapt a fresh base")


class _Adapted:
    """The forward of one linear."""

    def __init__(self, group: AdaptedGroup, position: int) -> None:
        self._group, self._position = group, position

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.output(self._position, x)


def _linear(model: nn.Module, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise BadBundle(f"this model has no {name}: the adapter is for another base") from error
    if not is_linear(module) or isinstance(module.forward, _Adapted):
        raise BadBundle(f"{name}: is no plain linear layer of the base; is the model adapted, quantised or wrapped already?")
    return module
