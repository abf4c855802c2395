"""Making plans: every family, models in memory, public relatives that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloven.errors import BadInput, UnsupportedModel
from cloven.model.groups import trace_groups
from cloven.model.source import open_source
from cloven.slip.config import SlipConfig
from cloven.slip.plan import Plan
from cloven.slip.planning import fingerprint, make_plan, stored_copy
from cloven.zoo.tiny import FAMILIES, tiny_config
from tests.lora_bundles import adapter_folder, peft_adapter
from tests.preparations import edit_weights, own_folder
from tests.split_models import tiny, tiny_folder

PRIVATE = SlipConfig()
ADAPTER = SlipConfig(scramble="none", origin="adapter")
PUBLIC = SlipConfig(scramble="none", origin="public-base")


def planned(model: Any, config: SlipConfig = PRIVATE, adapter: Path | None = None, base: Path | str | None = None) -> Plan:
    plan = make_plan(open_source(model), config, adapter, base, "cpu", "")
    assert plan is not None
    return plan


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gpt-neox"}))
def test_every_family(family: str) -> None:
    """Groups are the traced ones; every tensor of the state dict is either of a linear or among the others, never both."""
    plan, state = planned(tiny_folder(family)), tiny(family).state_dict()
    assert [[linear.name for linear in group] for group in plan.groups] == [list(group) for group in trace_groups(tiny_config(family))]
    of_linears = {f"{linear.name}.weight" for linear in plan.linears} | {f"{linear.name}.bias" for linear in plan.linears if linear.bias}
    assert of_linears | set(plan.others) == set(state) and not of_linears & set(plan.others)
    assert plan.dtype == "float32"


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt-neox", "falcon"])
def test_a_model_in_memory_is_stored_first(tmp_path: Path, family: str) -> None:
    source = open_source(tiny(family))
    assert make_plan(source, PRIVATE, None, None, "cpu", "") is None
    stored = stored_copy(source, tmp_path / "stored")
    plan = make_plan(stored, PRIVATE, None, None, "cpu", "")
    assert plan is not None
    checkpoint = plan.source.open()
    for linear in plan.linears:
        weight = tiny(family).get_submodule(linear.name).weight
        assert torch.equal(plan.matrix(checkpoint, linear), weight.t() if linear.transposed else weight)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "stored").glob("*.safetensors"))
    assert (tmp_path / "stored").stat().st_mode & 0o077 == 0


def test_a_checkpoint_whose_names_transformers_changes(tmp_path: Path) -> None:
    source = open_source(tiny_folder("gpt-neox"))
    assert make_plan(source, PRIVATE, None, None, "cpu", "") is None
    plan = make_plan(stored_copy(source, tmp_path / "stored"), PRIVATE, None, None, "cpu", "")
    assert plan is not None and torch.equal(
        plan.matrix(plan.source.open(), plan.linears[-1]), tiny("gpt-neox").get_submodule("lm_head").weight
    )


def test_the_dtype_is_that_of_from_pretrained(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "m")
    record = json.loads((folder / "config.json").read_text())
    edit_weights(folder, lambda held: held.update({name: tensor.bfloat16() for name, tensor in held.items()}))
    for stated, expected in (("float16", "float16"), (None, "bfloat16")):
        record |= {"dtype": stated}
        (folder / "config.json").write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
        assert planned(folder).dtype == expected


def test_no_floating_point_at_all(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "m")
    edit_weights(folder, lambda held: held.update({name: tensor.to(torch.int8) for name, tensor in held.items()}))
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in record.items() if name not in ("dtype", "torch_dtype")}))
    with pytest.raises(BadInput, match="holds no floating-point tensor"):
        planned(folder)


def test_a_checkpoint_in_shards(tmp_path: Path) -> None:
    """The same plan but for the files, and no model is made to find out."""
    tiny("llama").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    plan = planned(tmp_path / "m")
    assert len(plan.source.files) > 3
    assert replace(plan, source=planned(tiny_folder("llama")).source) == planned(tiny_folder("llama"))


def test_what_cannot_be_protected(tmp_path: Path) -> None:
    tiny_config("mixtral").save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedModel, match="mixture-of-experts"):
        make_plan(open_source(tmp_path / "m"), PRIVATE, None, None, "cpu", "")


# --- adapters


def test_an_adapter(tmp_path: Path) -> None:
    plan = planned(tiny_folder("llama"), ADAPTER, adapter=adapter_folder())
    assert plan.adapter is not None and plan.adapter.folder == str(adapter_folder()) and len(plan.adapter.sha256) == 64
    assert plan.base is None


def test_an_adapter_for_modules_that_the_model_lacks() -> None:
    with pytest.raises(BadInput, match=r"adapts transformer\.h\.0\.\S+, which is no linear layer of"):
        planned(tiny_folder("llama"), ADAPTER, adapter=adapter_folder("gpt2"))


def test_an_adapter_of_other_shapes() -> None:
    with pytest.raises(BadInput, match=r"the factors of \S+ do not fit its matrix \d+ x \d+"):
        planned(tiny_folder("llama"), ADAPTER, adapter=wrong_shapes())


def wrong_shapes() -> Path:
    """The tiny Llama's adapter, one factor wider."""
    from tests.split_models import scratch

    folder = scratch() / "adapter-wrong"
    if not folder.exists():
        peft_adapter(folder)
        path = folder / "adapter_model.safetensors"
        held = load_file(path)
        name = next(name for name in held if name.endswith("q_proj.lora_A.weight"))
        save_file(held | {name: torch.cat([held[name], held[name]], 1)}, path)
    return folder


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type is not LORA"),
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "all"}, "changes biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "may change the base"),
    ],
)
def test_what_is_no_plain_lora(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    peft_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(BadInput, match=match):
        planned(tiny_folder("llama"), ADAPTER, adapter=tmp_path / "a")


def test_an_adapter_is_checked_before_a_model_in_memory_is_stored() -> None:
    with pytest.raises(BadInput, match="not a PEFT adapter directory"):
        make_plan(open_source(tiny("llama")), ADAPTER, tiny_folder("llama"), None, "cpu", "")


# --- public bases


def test_a_public_base() -> None:
    plan = planned(tiny_folder("llama"), PUBLIC, base=tiny_folder("llama"))
    assert plan.base == plan.source and plan.adapter is None


@pytest.mark.parametrize("family", ["gpt2", "phi3", "falcon"])
def test_a_base_of_another_architecture(family: str) -> None:
    with pytest.raises(BadInput, match=r"lacks the weight model\.layers\.0"):
        planned(tiny_folder("llama"), PUBLIC, base=tiny_folder(family))


def test_a_base_of_another_shape(tmp_path: Path) -> None:
    folder, name = own_folder(tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda held: held.update({name: held[name][:-1].clone()}))
    with pytest.raises(BadInput, match=r"base: model\.layers\.1\.mlp\.up_proj\.weight has shape \[79, 48\]: it is no base of"):
        planned(tiny_folder("llama"), PUBLIC, base=folder)


@pytest.mark.parametrize("base", ["/nowhere/at/all", "./nowhere"])
def test_no_such_base(base: str) -> None:
    with pytest.raises(BadInput, match="no such model directory"):
        planned(tiny_folder("llama"), PUBLIC, base=base)


# --- the fingerprint


def test_the_fingerprint_names_every_matrix() -> None:
    plan = planned(tiny_folder("llama"))
    hashes = [[f"{linear.name}-hash" for linear in group] for group in plan.groups]
    known = fingerprint(plan, hashes)
    assert len(known) == 64 and fingerprint(plan, [list(group) for group in hashes]) == known
    others = set()
    for group, digests in enumerate(hashes):
        for position in range(len(digests)):
            changed = [list(digests) for digests in hashes]
            changed[group][position] = "another"
            others.add(fingerprint(plan, changed))
    swapped = [hashes[0][::-1], *hashes[1:]]
    assert len(others | {known, fingerprint(plan, swapped)}) == len(plan.linears) + 2
