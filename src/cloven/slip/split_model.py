"""The split model's description in config.json, and the swap of its modules on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from cloven.errors import BadBundle, BadInput
from cloven.slip.config import PRECISIONS, SCRAMBLES
from cloven.slip.layer import SplitGroup, SplitLinear

_LARGEST = 2**31
_FIELDS = {"precision", "scramble", "rounds", "groups"}
_EARLIER = ({"precision", "groups"}, {"precision", "scramble", "groups"})  # of bundles whose scrambles were broken


@dataclass(frozen=True)
class LinearShape:
    """One split linear: name, N, K, k, and whether it has a bias."""

    name: str
    rows: int
    columns: int
    rank: int
    bias: bool


@dataclass(frozen=True)
class SplitModelShape:
    """All groups of a split model, in the order of the exposed bundle."""

    precision: str
    scramble: str
    groups: tuple[tuple[LinearShape, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for config.json."""
        groups = [[asdict(linear) for linear in group] for group in self.groups]
        return {"precision": self.precision, "scramble": self.scramble, "rounds": SCRAMBLES[self.scramble], "groups": groups}

    @classmethod
    def from_dict(cls, record: object) -> SplitModelShape:
        """Parse and check.

        Raises:
            BadBundle: malformed.
        """
        if isinstance(record, dict) and set(record) in _EARLIER:
            raise BadBundle("config.json: an earlier version of cloven made this bundle: prepare it again")
        try:
            if not isinstance(record, dict) or set(record) != _FIELDS:
                raise TypeError
            if record["precision"] not in PRECISIONS or record["scramble"] not in SCRAMBLES:
                raise TypeError
            if record["rounds"] != SCRAMBLES[record["scramble"]]:
                raise TypeError
            groups = tuple(tuple(LinearShape(**linear) for linear in group) for group in record["groups"])
            for linear in (linear for group in groups for linear in group):
                sizes = (linear.rows, linear.columns, linear.rank)
                if type(linear.name) is not str or type(linear.bias) is not bool or any(type(size) is not int for size in sizes):
                    raise TypeError
                if not (
                    0 < linear.rows < _LARGEST and 0 < linear.columns < _LARGEST and 0 <= linear.rank <= min(linear.rows, linear.columns)
                ):
                    raise TypeError
            if not groups or any(len({linear.columns for linear in group}) != 1 for group in groups):
                raise TypeError
        except TypeError as error:
            raise BadBundle("config.json: the description of the split ('model' in quantization_config) is malformed") from error
        return cls(record["precision"], record["scramble"], groups)


def swap_modules(model: nn.Module, shape: SplitModelShape) -> list[SplitGroup]:
    """Put `SplitLinear`s in the place of the linears, without allocating anything but what is already real.

    Raises:
        BadInput: the model has no such module: it was loaded by another class than AutoModelForCausalLM.
    """
    groups = []
    for index, linears in enumerate(shape.groups):
        members, whole = list[SplitLinear](), sum(linear.rows for linear in linears)
        terms, rounds = PRECISIONS[shape.precision], SCRAMBLES[shape.scramble]
        for linear in linears:
            try:
                model.get_submodule(linear.name)
            except AttributeError as error:
                raise BadInput(f"{type(model).__name__} has no module {linear.name}: load this bundle with AutoModelForCausalLM") from error
            with torch.device("meta"):
                sizes = linear.rows, linear.columns, linear.rank
                member = SplitLinear(linear.name, *sizes, terms, linear.bias, rounds, 0 if members else whole)
            model.set_submodule(linear.name, member)
            members.append(member)
        groups.append(SplitGroup(index, members))
    return groups


def groups_of(model: nn.Module) -> list[SplitGroup]:
    """The groups of a loaded split model, in order.

    Raises:
        BadInput: the model is not split by SLIP.
    """
    groups: dict[int, SplitGroup] = {}
    for module in model.modules():
        if isinstance(module, SplitLinear) and module.group is not None:
            groups.setdefault(id(module.group), module.group)
    if not groups:
        raise BadInput("this model is not split by SLIP: load OUT/trusted of a bundle that `cloven prepare slip` made")
    return sorted(groups.values(), key=lambda group: group.index)
