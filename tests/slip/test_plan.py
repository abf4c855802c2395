"""The plan that jobs read."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloven.errors import BadInput, ClovenError
from cloven.model.checkpoint import Checkpoint
from cloven.model.source import open_source
from cloven.slip.config import SlipConfig
from cloven.slip.plan import PLAN, Plan, PlannedAdapter, PlannedLinear, Tensors, write_json
from cloven.slip.planning import make_plan
from tests.lora_bundles import adapter_folder, peft_adapter
from tests.preparations import edit_weights, own_folder
from tests.split_models import tiny, tiny_folder


def plan_of(folder: Path, **more: Any) -> Plan:
    origin = "adapter" if "adapter" in more else "public-base" if "public_base" in more else "private"
    config = SlipConfig(scramble="mixing" if origin == "private" else "none", origin=origin)
    plan = make_plan(open_source(folder), config, more.get("adapter"), more.get("public_base"), "cpu", "")
    assert plan is not None
    return plan


@pytest.mark.parametrize("origin", ["private", "public-base", "adapter"])
def test_what_is_written_is_read(tmp_path: Path, origin: str) -> None:
    more = {"private": {}, "public-base": {"public_base": tiny_folder("llama")}, "adapter": {"adapter": adapter_folder()}}[origin]
    plan = plan_of(tiny_folder("llama"), **more)
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan
    assert stat.S_IMODE((tmp_path / PLAN).stat().st_mode) == 0o600 and [path.name for path in tmp_path.iterdir()] == [PLAN]
    assert (plan.base is not None) is (origin == "public-base") and (plan.adapter is not None) is (origin == "adapter")


def test_no_weights_and_no_keys_are_in_it(tmp_path: Path) -> None:
    """Ray's tasks and whoever looks at it learn paths and shapes."""
    plan_of(tiny_folder("llama")).write(tmp_path)
    content = (tmp_path / PLAN).read_text()
    assert set(json.loads(content)) == {"source", "base", "adapter", "groups", "others", "dtype", "config", "device", "calibration"}
    assert len(content) < 10_000 and "key" not in json.loads(content)


def test_matrices_are_those_of_the_model() -> None:
    for family in ("llama", "gpt2", "phi3"):  # gpt2 stores them transposed
        plan = plan_of(tiny_folder(family))
        checkpoint = plan.source.open()
        for linear in plan.linears:
            weight = tiny(family).get_submodule(linear.name).weight
            assert linear.transposed is (family == "gpt2" and linear.name != "lm_head")
            assert torch.equal(plan.matrix(checkpoint, linear), weight.t() if linear.transposed else weight), linear.name
            assert plan.matrix(checkpoint, linear).shape == (linear.rows, linear.columns)


def test_matrices_come_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    plan = plan_of(folder)
    assert plan.dtype == "bfloat16" and plan.matrix(plan.source.open(), plan.linears[0]).dtype == torch.bfloat16


def test_a_matrix_of_integers(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "m")
    edit_weights(folder, lambda held: held.update({"lm_head.weight": held["lm_head.weight"].to(torch.int32)}))
    plan = plan_of(folder)
    with pytest.raises(BadInput, match=r"lm_head: the weight is torch\.int32, no floating-point matrix"):
        plan.matrix(plan.source.open(), plan.linears[-1])


def test_weights_of_groups() -> None:
    plan = plan_of(tiny_folder("llama"))
    assert [plan.weight_of(index) for index in range(4)] == [48 * 48 + 2 * 24 * 48, 48 * 48, 2 * 80 * 48, 80 * 48]
    assert sum(plan.weight_of(index) for index in range(len(plan.groups))) == sum(linear.rows * linear.columns for linear in plan.linears)


# --- what changes is noticed


@pytest.mark.parametrize("change", ["time", "size", "gone", "more"])
def test_another_checkpoint_in_the_same_place(tmp_path: Path, change: str) -> None:
    folder = own_folder(tmp_path / "m")
    tensors = Tensors.of(Checkpoint(folder))
    assert tensors.open().names == Checkpoint(folder).names
    file = folder / "model.safetensors"
    if change == "time":
        os.utime(file, ns=(0, 0))
    elif change == "size":
        edit_weights(folder, lambda held: held.pop("model.norm.weight"), keep_time=True)
    elif change == "more":
        edit_weights(folder, lambda held: held.update(x=torch.zeros(1)), keep_time=True)
    else:
        file.unlink()
    with pytest.raises(BadInput, match=r"has changed since the preparation began|the weights cannot be loaded"):
        tensors.open()


def test_another_adapter_in_the_same_place(tmp_path: Path) -> None:
    peft_adapter(tmp_path / "a")
    planned = plan_of(tiny_folder("llama"), adapter=tmp_path / "a").adapter
    assert planned is not None and set(planned.modules()) == {linear.name for linear in plan_of(tiny_folder("llama")).linears[:-1]}
    peft_adapter(tmp_path / "a", seed=1)
    with pytest.raises(BadInput, match="the adapter has changed since the preparation began"):
        planned.modules()
    with pytest.raises(BadInput, match="not a PEFT adapter directory"):
        PlannedAdapter(str(tmp_path), planned.sha256).modules()


# --- what is damaged


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be continued: remove it to start afresh"):
        Plan.read(tmp_path)


@pytest.mark.parametrize(
    "change", [{"device": None}, {"more": 1}, {"source": {}}, {"source": 3}, {"groups": 3}, {"groups": [[{}]]}, {"config": {"rank": -1}}]
)
def test_a_damaged_plan(tmp_path: Path, change: dict[str, Any]) -> None:
    plan_of(tiny_folder("llama")).write(tmp_path)
    record = json.loads((tmp_path / PLAN).read_text()) | change
    if change.get("device", "") is None:
        del record["device"]
    (tmp_path / PLAN).write_text(json.dumps(record))
    with pytest.raises(BadInput):
        Plan.read(tmp_path)


@given(content=st.one_of(st.binary(max_size=100), st.sampled_from([b"[" * 60_000, b"[]", b"3", b"{}", b"null"])))
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PLAN).write_bytes(content)
    with pytest.raises(ClovenError) as caught:
        Plan.read(tmp_path)
    assert isinstance(caught.value, BadInput)


def test_json_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})

    def full(*_: Any, **__: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="full"):
        write_json(tmp_path / "a.json", {"new": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_a_linear_is_described_completely() -> None:
    (first, *_), *_ = plan_of(tiny_folder("gpt2")).groups
    assert first == PlannedLinear(
        "transformer.h.0.attn.c_attn", 144, 48, "transformer.h.0.attn.c_attn.weight", True, "transformer.h.0.attn.c_attn.bias"
    )
