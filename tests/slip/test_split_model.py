from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from cloven.errors import BadBundle, BadInput
from cloven.slip.layer import SplitLinear
from cloven.slip.split_model import LinearShape, SplitModelShape, groups_of, swap_modules
from tests.split_models import tiny_bundle

SHAPE = SplitModelShape(
    "int8x2",
    "mixing",
    (
        (LinearShape("block.q", 6, 4, 1, True), LinearShape("block.k", 3, 4, 0, False)),
        (LinearShape("head", 9, 4, 2, False),),
    ),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 6), nn.Linear(4, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 9)


def test_json_round_trip() -> None:
    assert SplitModelShape.from_dict(json.loads(json.dumps(SHAPE.to_dict()))) == SHAPE


def mutated(path: list[Any], value: Any) -> Any:
    record: Any = copy.deepcopy(SHAPE.to_dict())
    target = record
    for step in path[:-1]:
        target = target[step]
    if value is KeyError:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return record


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        "int8",
        {},
        mutated(["precision"], "int4"),
        mutated(["scramble"], True),
        mutated(["scramble"], "xor"),
        mutated(["precision"], ["int8"]),
        mutated(["precision"], {}),
        mutated(["rounds"], 2),
        mutated(["rounds"], None),
        mutated(["more"], 1),
        mutated(["groups"], []),
        mutated(["groups"], None),
        mutated(["groups"], 3),
        mutated(["groups", 0], []),
        mutated(["groups", 0, 0, "rows"], 0),
        mutated(["groups", 0, 0, "rows"], -1),
        mutated(["groups", 0, 0, "rows"], 2**31),
        mutated(["groups", 0, 0, "rows"], 6.0),
        mutated(["groups", 0, 0, "rows"], True),
        mutated(["groups", 0, 0, "rank"], 5),
        mutated(["groups", 0, 0, "rank"], -1),
        mutated(["groups", 0, 0, "bias"], 1),
        mutated(["groups", 0, 0, "name"], 7),
        mutated(["groups", 0, 0, "name"], KeyError),
        mutated(["groups", 0, 0, "extra"], 7),
        mutated(["groups", 0, 0], "q"),
        mutated(["groups", 0, 1, "columns"], 5),  # the members of a group share an input
    ],
)
def test_malformed_descriptions_are_refused(record: Any) -> None:
    with pytest.raises(BadBundle, match="malformed"):
        SplitModelShape.from_dict(record)


@pytest.mark.parametrize("unknown", [{"rounds"}, {"rounds", "scramble"}], ids=["two rounds", "permutations"])
def test_a_bundle_of_an_earlier_version(unknown: set[str]) -> None:
    record = {name: value for name, value in SHAPE.to_dict().items() if name not in unknown}
    with pytest.raises(BadBundle, match="an earlier version of cloven made this bundle: prepare it again"):
        SplitModelShape.from_dict(record)


def test_modules_are_swapped_in_place_without_memory() -> None:
    model = Model()
    groups = swap_modules(model, SHAPE)
    assert [group.name for group in groups] == ["block.{q,k}", "head"]
    members = [member for group in groups for member in group.members]
    assert all(member is model.get_submodule(member.name) for member in members)
    assert all(parameter.device.type == "meta" for member in members for parameter in member.parameters())
    assert [(m.out_features, m.in_features, m.bias is not None) for m in members] == [(6, 4, True), (3, 4, False), (9, 4, False)]
    assert members[0].column_gather.shape == (4, 4) and members[0].mixing_scale.shape == (3, 9)
    assert members[0].row_gather.shape == (2, 6) and members[0].secret_a.shape == (1, 4) and members[0].secret_b.shape == (6, 1)
    assert hasattr(members[0], "column_gather") and not hasattr(members[1], "column_gather") and hasattr(members[2], "column_gather")
    assert all(member.weight.shape == (0,) for member in members)  # loading without cloven must end in a size mismatch


def test_the_wrong_class_of_model() -> None:
    with pytest.raises(BadInput, match=r"Block has no module block\.q: load this bundle with AutoModelForCausalLM"):
        swap_modules(Block(), SHAPE)


def test_groups_of() -> None:
    model = Model()
    groups = swap_modules(model, SHAPE)
    assert groups_of(model) == groups
    with pytest.raises(BadInput, match="not split by SLIP"):
        groups_of(Model())


def test_a_real_bundle_describes_its_model() -> None:
    bundle = tiny_bundle("llama")
    record = json.loads((bundle.trusted / "config.json").read_text())["quantization_config"]
    shape = SplitModelShape.from_dict(record["model"])
    terms = 1
    for group, exposed in zip(shape.groups, bundle.manifest.exposed.groups, strict=True):
        assert exposed.rows == terms * sum(linear.rows for linear in group) and exposed.columns == group[0].columns
    assert {module for group in shape.groups for module in (linear.name.rpartition(".")[2] for linear in group)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip
    assert isinstance(SplitLinear("a", 1, 1, 0, 1, False, 0, 1).weight, torch.nn.Parameter)
