"""Splits whose secret part is an adapter, or the difference from a public base: what is exposed is a function of the base.

"Exposed" means the whole folder that the worker gets, every file of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cloven.audit.exposed_only import exposed_model
from cloven.bundle.bundle import Bundle
from cloven.demo.merged import merged_model
from cloven.errors import BadInput
from cloven.slip.config import SlipConfig
from cloven.slip.prepare import prepare_slip
from tests.lora_bundles import adapter_folder, merged, peft_adapter
from tests.preparations import edit_weights, fine_tune, hashes, own_folder
from tests.split_models import attached, logits, random_ids, relative_error, tiny, tiny_folder

IDS = random_ids(97, 2, 12)
FAMILIES = ("llama", "gpt2", "phi3")


def adapter_bundle(out: Path, family: str = "llama", precision: str = "int8x2", seed: int = 0) -> Bundle:
    config = SlipConfig(precision=precision, scramble="none", origin="adapter")
    return prepare_slip(tiny_folder(family), out, config, adapter=adapter_folder(family, seed))


def public_bundle(out: Path, tuned: Path, base: Path | None = None, **settings: Any) -> Bundle:
    config = SlipConfig(**{"precision": "int8x2", **settings}, scramble="none", origin="public-base")
    return prepare_slip(tuned, out, config, public_base=base or tiny_folder("llama"))


def from_the_base_alone(out: Path, base: Path, precision: str = "int8x2") -> Bundle:
    """What anybody can do who has the public base."""
    return prepare_slip(base, out, SlipConfig(secret_fraction=0, precision=precision, scramble="none"))


def held_by(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# --- an adapter


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_exposed_half_is_a_function_of_the_base(tmp_path: Path, family: str, precision: str) -> None:
    """Rebuilt without the adapter, byte by byte; and with another adapter."""
    bundle = adapter_bundle(tmp_path / "out", family, precision)
    rebuilt = from_the_base_alone(tmp_path / "rebuilt", tiny_folder(family), precision)
    other = adapter_bundle(tmp_path / "other", family, precision, seed=1)
    assert bundle.id == rebuilt.id == other.id
    assert hashes(bundle.exposed) == hashes(rebuilt.exposed) == hashes(other.exposed)
    assert len(hashes(bundle.exposed)) > 3
    assert hashes(bundle.trusted) != hashes(other.trusted)


def test_an_adapter_of_a_few_modules(tmp_path: Path) -> None:
    """Nor does it show which modules are adapted, or the rank."""
    peft_adapter(tmp_path / "adapter", target_modules=["q_proj", "down_proj"], r=7)
    bundle = prepare_slip(tiny_folder("llama"), tmp_path / "out", adapter=tmp_path / "adapter")
    rebuilt = from_the_base_alone(tmp_path / "rebuilt", tiny_folder("llama"), "int8")
    assert hashes(bundle.exposed) == hashes(rebuilt.exposed)
    held = held_by(bundle.trusted)
    ranks = {name.removesuffix(".secret_a"): tensor.shape[0] for name, tensor in held.items() if name.endswith(".secret_a")}
    assert {rank for name, rank in ranks.items() if name.endswith(("q_proj", "down_proj"))} == {7}
    assert {rank for name, rank in ranks.items() if not name.endswith(("q_proj", "down_proj"))} == {0}


def test_the_secret_part_is_exactly_the_adapter(tmp_path: Path) -> None:
    held = held_by(adapter_bundle(tmp_path / "out").trusted)
    stored = load_file(adapter_folder() / "adapter_model.safetensors")
    factors = [name for name in stored if "lora_A" in name]
    assert factors
    for name in factors:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert torch.equal(held[f"{module}.secret_a"], stored[name])
        scale = 8 / stored[name].shape[0]
        assert torch.equal(held[f"{module}.secret_b"], stored[name.replace("lora_A", "lora_B")] * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_merged_model(tmp_path: Path, family: str) -> None:
    with attached(adapter_bundle(tmp_path / "out", family)) as (model, session):
        found = logits(model, IDS)
        assert session.telemetry.total().exchanges > 0
    assert relative_error(found, logits(merged(family), IDS)) < 1e-3
    assert relative_error(logits(tiny(family), IDS), logits(merged(family), IDS)) > 0.05  # the adapter does something


def test_the_summary_of_an_adapter(tmp_path: Path) -> None:
    bundle = adapter_bundle(tmp_path / "out")
    summary = bundle.manifest.summary
    assert summary["secret_energy"] == pytest.approx(1)  # all of the adapter is secret
    assert summary["kinds"]["lm_head"]["layers_without_secret"] == 1
    assert bundle.manifest.parameters["origin"] == "adapter" and bundle.manifest.parameters["scramble"] == "none"


def test_defaults_without_a_configuration(tmp_path: Path) -> None:
    bundle = prepare_slip(tiny_folder("llama"), tmp_path / "out", adapter=adapter_folder())
    assert bundle.manifest.parameters == SlipConfig(scramble="none", origin="adapter").to_dict()
    tuned = fine_tune(tmp_path / "tuned")
    bundle = prepare_slip(tuned, tmp_path / "public", public_base=tiny_folder("llama"))
    assert bundle.manifest.parameters == SlipConfig(scramble="none", origin="public-base").to_dict()


def test_an_adapter_for_a_model_in_memory(tmp_path: Path) -> None:
    config = SlipConfig(precision="int8x2", scramble="none", origin="adapter")
    bundle = prepare_slip(tiny("llama"), tmp_path / "out", config, adapter=adapter_folder())
    assert bundle.id == adapter_bundle(tmp_path / "other").id


def test_weights_of_the_base_that_are_no_numbers(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "model")
    edit_weights(folder, lambda held: held["model.layers.0.mlp.up_proj.weight"].view(-1)[3].fill_(float("inf")))
    with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp\.up_proj: the weight holds NaN or infinity"):
        prepare_slip(folder, tmp_path / "out", adapter=adapter_folder())
    assert not (tmp_path / "out").exists()


def test_weights_of_an_unadapted_layer_that_are_no_numbers(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "model")
    edit_weights(folder, lambda held: held["lm_head.weight"].view(-1)[3].fill_(float("nan")))
    with pytest.raises(BadInput, match="lm_head: the weight holds NaN or infinity"):
        prepare_slip(folder, tmp_path / "out", adapter=adapter_folder())


# --- a public base


def test_scales_are_those_of_the_base(tmp_path: Path) -> None:
    """They are trusted, but tests of the codes' distribution would otherwise find the fine-tune in them."""
    bundle = public_bundle(tmp_path / "out", fine_tune(tmp_path / "tuned", rank=4))
    rebuilt = from_the_base_alone(tmp_path / "rebuilt", tiny_folder("llama"))
    ours, theirs = held_by(bundle.trusted), held_by(rebuilt.trusted)
    names = [name for name in ours if name.endswith(("row_scale", "column_scale", "row_gather", "column_gather"))]
    assert len(names) == 15 * 2 + 9 * 2 and all(torch.equal(ours[name], theirs[name]) for name in names)


def test_exposed_and_secret_add_up_to_the_fine_tune(tmp_path: Path) -> None:
    tuned = fine_tune(tmp_path / "tuned", rank=6)
    bundle = public_bundle(tmp_path / "out", tuned, rank=2)
    held, weights = held_by(bundle.trusted), load_file(tuned / "model.safetensors")
    exposed = exposed_model(bundle, knows_scramble=True)
    for name, module in tiny("llama").named_modules():
        if isinstance(module, torch.nn.Linear):
            part = exposed.get_submodule(name)(torch.eye(module.in_features)).t()
            w = weights[f"{name}.weight"]
            assert held[f"{name}.secret_a"].shape[0] == 2
            # What of the fine-tune lies beyond the base's scales is clipped: a few entries, by little.
            assert relative_error(part + held[f"{name}.secret_b"] @ held[f"{name}.secret_a"], w) < 0.02, name


def test_the_logits_are_those_of_the_fine_tune(tmp_path: Path) -> None:
    tuned = fine_tune(tmp_path / "tuned", rank=2)
    from transformers import AutoModelForCausalLM

    expected = logits(AutoModelForCausalLM.from_pretrained(tuned), IDS)
    with attached(public_bundle(tmp_path / "out", tuned, rank=2)) as (model, _):
        assert relative_error(logits(model, IDS), expected) < 2e-3
    assert relative_error(logits(tiny("llama"), IDS), expected) > 0.02


def test_a_fine_tune_inside_the_secret_rank_leaves_the_base(tmp_path: Path) -> None:
    """The codes are the base's own but for entries that lie within rounding of a boundary between two codes."""
    bundle = public_bundle(tmp_path / "out", fine_tune(tmp_path / "tuned", rank=2), rank=2, precision="int8")
    codes, base = held_by(bundle.exposed), held_by(from_the_base_alone(tmp_path / "base", tiny_folder("llama"), "int8").exposed)
    differing = total = 0
    for name, tensor in codes.items():
        apart = (tensor.int() - base[name].int()).abs()
        assert int(apart.max()) <= 1
        differing, total = differing + int(apart.count_nonzero()), total + tensor.numel()
    assert differing / total < 1e-4


def test_the_summary_says_how_much_of_the_fine_tune_is_secret(tmp_path: Path) -> None:
    tuned = fine_tune(tmp_path / "tuned", rank=6)
    bundle = public_bundle(tmp_path / "out", tuned, rank=3)
    weights, secret, whole = load_file(tuned / "model.safetensors"), 0.0, 0.0
    for name, module in tiny("llama").named_modules():
        if isinstance(module, torch.nn.Linear):
            squares = torch.linalg.svdvals((weights[f"{name}.weight"] - module.weight.detach()).double()).square()
            secret, whole = secret + float(squares[:3].sum()), whole + float(squares.sum())
    assert 0.5 < secret / whole < 0.95
    assert bundle.manifest.summary["secret_energy"] == pytest.approx(secret / whole, rel=1e-4)


def test_the_budget_goes_to_the_difference(tmp_path: Path) -> None:
    """Only two matrices were tuned; both get what they need, the others at most what is left."""
    tuned = own_folder(tmp_path / "tuned")
    names = ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    edit_weights(
        tuned,
        lambda held: [held[name].add_(torch.outer(torch.ones(held[name].shape[0]), torch.ones(held[name].shape[1]))) for name in names],
    )
    bundle = public_bundle(tmp_path / "out", tuned, secret_fraction=0.01)
    held = held_by(bundle.trusted)
    assert all(held[name.replace(".weight", ".secret_a")].shape[0] >= 1 for name in names)
    assert bundle.manifest.summary["secret_energy"] == pytest.approx(1)


def test_without_a_secret_rank_the_fine_tune_is_exposed(tmp_path: Path) -> None:
    """And the summary does not hide it."""
    bundle = public_bundle(tmp_path / "out", fine_tune(tmp_path / "tuned"), rank=0)
    assert bundle.manifest.summary["secret_energy"] == 0


def test_a_base_in_another_dtype(tmp_path: Path) -> None:
    """As published bases often are: it is read in the dtype of the fine-tune."""
    base = own_folder(tmp_path / "base")
    edit_weights(base, lambda held: held.update({name: tensor.half() for name, tensor in held.items()}))
    tuned = fine_tune(tmp_path / "tuned")
    public_bundle(tmp_path / "out", tuned, base).verify()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_holds_no_numbers(tmp_path: Path, value: float) -> None:
    base = own_folder(tmp_path / "base")
    edit_weights(base, lambda held: held["lm_head.weight"].view(-1)[3].fill_(value))
    with pytest.raises(BadInput, match="lm_head: the base's weight holds NaN or infinity"):
        public_bundle(tmp_path / "out", tiny_folder("llama"), base)


def test_a_base_of_another_architecture_or_shape(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="lacks the weight"):
        public_bundle(tmp_path / "out", tiny_folder("llama"), tiny_folder("gpt2"))
    with pytest.raises(BadInput, match="it is no base of"):
        public_bundle(tmp_path / "out", tiny_folder("llama"), tiny_folder("llama-mha"))
    assert not list(tmp_path.iterdir())


# --- arguments


@pytest.mark.parametrize(
    ("config", "arguments", "match"),
    [
        (SlipConfig(), {"adapter": "x"}, "says origin='private', the arguments say 'adapter'"),
        (SlipConfig(), {"public_base": "x"}, "says origin='private', the arguments say 'public-base'"),
        (SlipConfig(origin="adapter", scramble="none"), {}, "says origin='adapter', the arguments say 'private'"),
        (SlipConfig(origin="adapter", scramble="none"), {"public_base": "x"}, "the arguments say 'public-base'"),
        (None, {"adapter": "x", "public_base": "y"}, "give either an adapter .* or a public base"),
        (None, {"adapter": "/nowhere"}, "not a PEFT adapter directory"),
        (None, {"public_base": "/nowhere"}, "no such model directory"),
        (None, {"device": "tpu"}, "device 'tpu': choose cpu, or cuda"),
        (None, {"engine": "dask"}, "choose one of auto, inline, pool, ray"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, config: SlipConfig | None, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        prepare_slip(tiny_folder("llama"), tmp_path / "out", config, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_merged_by_us_is_merged_by_peft() -> None:
    """What these splits are compared with."""
    ours = merged_model(tiny_folder("llama"), adapter_folder())
    assert relative_error(logits(ours, IDS), logits(merged(), IDS)) < 1e-5


def test_a_base_that_is_the_model_itself(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the same: there is nothing to keep secret"):
        prepare_slip(tiny_folder("llama"), tmp_path / "out", public_base=tiny_folder("llama"))
    assert not (tmp_path / "out").exists()
