from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cloven.audit import registry
from cloven.audit.findings import Findings
from cloven.audit.kv_shield.subject import MODES
from cloven.audit.registry import audit
from cloven.audit.slip.training import Budget
from cloven.errors import BadBundle, BadInput, ForeignBundle
from tests.kv_bundles import kv_bundle
from tests.lora_bundles import own_bundle
from tests.split_models import tiny, tiny_bundle

NEEDED = 2 * (12 + 16) + 16  # of the tiny models, at ρ = 16


def tokens(count: int) -> Tensor:
    """A text with repetitions, int64 [T]."""
    return torch.randint(1, 40, (count,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2"])
def test_a_bundle_is_audited_in_every_mode(family: str) -> None:
    attacks = audit(kv_bundle(family, "session"), tokens(NEEDED)).attacks
    assert {attack.scheme for attack in attacks} == {f"kv-shield/{mode}" for mode in MODES}
    value = {(attack.name, attack.scheme.removeprefix("kv-shield/")): attack.value for attack in attacks}
    assert value["table", "none"] == value["sorting", "permute"] == value["weights", "permute"] == 1.0
    assert value["sorting", "session"] < 0.3 and value["sorting", "sealed"] < 0.3


def test_both_modes_give_the_same_public_model_to_the_thief() -> None:
    public = [
        {(a.name, a.value) for a in audit(kv_bundle("llama", mode), tokens(NEEDED)).attacks if a.scheme == "kv-shield/none"}
        for mode in ("permute", "session")
    ]
    assert public[0] == public[1]


def test_a_kv_shield_bundle_is_audited_with_and_without_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(out: Path, text: Tensor | None, seed: int) -> Findings:
        seen.append(text)
        return Findings("kv-shield", [])

    monkeypatch.setattr(registry, "audit_kv_shield", record)
    assert audit(kv_bundle("llama", "session")).scheme == audit(kv_bundle("llama", "session"), tokens(NEEDED)).scheme == "kv-shield"
    assert seen[0] is None and torch.equal(seen[1], tokens(NEEDED))


def test_a_text_must_be_long_enough() -> None:
    with pytest.raises(BadInput, match=f"the text has {NEEDED - 1} tokens: give at least {NEEDED}"):
        audit(kv_bundle("llama", "session"), tokens(NEEDED - 1))


def test_what_cannot_be_audited(tmp_path: Path) -> None:
    with pytest.raises(BadBundle):
        audit(tmp_path)
    with pytest.raises(BadBundle):
        audit(kv_bundle("llama", "permute") / "trusted")
    shutil.copytree(kv_bundle("llama", "permute") / "trusted", tmp_path / "out" / "trusted")
    with pytest.raises(BadBundle):
        audit(tmp_path / "out")
    shutil.copytree(kv_bundle("qwen2", "permute") / "exposed", tmp_path / "out" / "exposed")
    with pytest.raises(ForeignBundle):
        audit(tmp_path / "out")


def test_a_slip_bundle_is_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(out: Path, text: Tensor | None, **settings: Any) -> Findings:
        seen.update(settings, text=text)
        return Findings("slip", [])

    monkeypatch.setattr(registry, "audit_slip", record)
    assert audit(tiny_bundle("llama").path, seed=3, budget=Budget(seconds=30)).scheme == "slip"
    assert seen["text"] is None and (seen["seed"], seen["budget"], seen["relative"]) == (3, Budget(seconds=30), None)
    audit(tiny_bundle("llama").path, tokens(600))
    assert seen["text"].shape == (2, 256)
    audit(tiny_bundle("llama").path, tokens(100))
    assert seen["text"].shape == (1, 100)


def test_a_relative_is_for_slip() -> None:
    with pytest.raises(BadInput, match="for the audit of a SLIP bundle"):
        audit(kv_bundle("llama", "permute"), tokens(NEEDED), relative=tiny("llama"))


def test_a_private_lora_bundle_is_audited(tmp_path: Path) -> None:
    attacks = audit(own_bundle(tmp_path / "out", budget=8)).attacks
    assert {attack.scheme for attack in attacks} <= {
        "private-lora/lwe",
        "private-lora/lwe, more answers than the budget allows",
        "private-lora/fhe",
    }
    assert {"regression_budget", "packing", "hint_inversion", "distinguish"} <= {attack.name for attack in attacks}


def test_a_text_for_a_private_lora_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="audited without a text"):
        audit(own_bundle(tmp_path / "out"), tokens(NEEDED))


def test_halves_of_a_private_lora_bundle_alone_are_refused(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out")
    shutil.copytree(out / "client", tmp_path / "clients" / "client")
    shutil.copytree(out / "server", tmp_path / "owners" / "server")
    for folder, match in (
        (tmp_path / "clients", "no bundle here with both halves"),
        (out / "client", "no bundle here with both halves"),
        (out / "server", "no bundle here with both halves"),
        (tmp_path / "owners", "client"),
    ):
        with pytest.raises(BadBundle, match=match):
            audit(folder)
