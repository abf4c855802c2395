"""Whole audits of a tiny model's adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cloven.audit.private_lora.audit import NOT_TESTED, audit_private_lora
from cloven.audit.private_lora.distinguishing import coin_verdict
from cloven.errors import BadBundle, LedgerUnusable
from cloven.private_lora.ledger import Ledger
from cloven.private_lora.manifest import ServerManifest
from tests.audit.private_lora.targets import COLUMNS, SMALL, WIDE, audited, bundle, findings
from tests.lora_bundles import own_bundle

REGRESSIONS = ("regression_quarter", "regression_half", "regression_all", "regression_budget")
NAMES = (*REGRESSIONS, "averaging", "unit_queries", "packing", "hint_inversion", "distinguish", "division")


def test_as_json() -> None:
    for attack in json.loads(json.dumps([attack.to_dict() for attack in audited(WIDE).values()])):
        assert set(attack) >= {"name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict"}
        assert attack["scheme"] == ("private-lora/fhe" if attack["name"] == "division" else "private-lora/lwe")
        assert attack["adversary"].startswith("a server" if attack["name"] == "distinguish" else "a client")
        assert attack["tries"] > 0 and 0 <= attack["chance"] <= 1 and 0 <= attack["value"] <= 1


@pytest.mark.parametrize(("budget", "bits", "hint"), [(WIDE, 16, "lwe"), (SMALL, 16, "lwe"), (SMALL, 8, "statistical")])
def test_every_attack_succeeds_where_the_protection_is_missing(budget: int, bits: int, hint: str) -> None:
    weakened = {name: attack.weakened_value for name, attack in audited(budget, bits, hint).items()}
    assert all(value >= 0.95 for value in weakened.values()), weakened


@pytest.mark.parametrize(("budget", "bits", "hint"), [(WIDE, 16, "lwe"), (SMALL, 16, "lwe"), (SMALL, 8, "statistical")])
def test_what_no_budget_buys(budget: int, bits: int, hint: str) -> None:
    attacks = audited(budget, bits, hint)
    assert {name: attacks[name].verdict for name in ("averaging", "hint_inversion", "division")} == dict.fromkeys(
        ("averaging", "hint_inversion", "division"), "holds"
    )
    assert attacks["averaging"].value < 1e-9 and attacks["hint_inversion"].value < 0.01 and attacks["division"].value < 0.05
    assert abs(attacks["distinguish"].value - 0.5) < 0.2  # 5.6 standard deviations
    assert attacks["distinguish"].verdict == coin_verdict(attacks["distinguish"].value, 200)


def test_a_wide_budget_buys_everything() -> None:
    attacks = audited(WIDE)
    for name in ("regression_all", "regression_budget", "unit_queries", "packing"):
        assert attacks[name].verdict == "broken" and attacks[name].value > 0.99
    assert attacks["unit_queries"].chance == attacks["packing"].chance == 1.0


@pytest.mark.parametrize("hint", ["lwe", "statistical"])
def test_a_small_budget_buys_its_share(hint: str) -> None:
    attacks = audited(SMALL, 16 if hint == "lwe" else 8, hint)
    for name in ("regression_quarter", "regression_budget", "unit_queries", "packing"):
        assert attacks[name].verdict == "measured" and 0.05 < attacks[name].value < 0.5
    assert attacks["regression_budget"].tries == SMALL and attacks["regression_budget"].value < 2.5 * SMALL / COLUMNS
    assert attacks["unit_queries"].value == pytest.approx(SMALL / COLUMNS)
    bits = 16 if hint == "lwe" else 8
    assert attacks["packing"].value == pytest.approx(attacks["packing"].chance) == SMALL * bits / (8 * COLUMNS)  # it reaches the bound
    assert attacks["regression_all"].verdict == "broken"  # what a larger budget would give away is shown as well


def test_an_audit_charges_nothing_and_changes_no_file(tmp_path: Path) -> None:
    def contents() -> dict[str, str]:
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*")) if path.is_file()}

    out = own_bundle(tmp_path / "out", budget=SMALL)
    before = contents()
    audit_private_lora(out)
    assert contents() == before
    manifest = ServerManifest.read(out / "server")
    with closing(Ledger(manifest.ledger_path(out / "server"), manifest.adapter)) as ledger:
        assert ledger.accounts() == []


def test_halves_that_are_missing(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out")
    for half in ("client", "server"):
        alone = tmp_path / half
        shutil.copytree(out / half, alone / half)
        with pytest.raises(BadBundle):
            audit_private_lora(alone)


def test_no_audit_without_the_ledger(tmp_path: Path) -> None:
    out = own_bundle(tmp_path / "out")
    (out / "server" / "ledger.sqlite").unlink()
    with pytest.raises(LedgerUnusable, match="missing"):
        audit_private_lora(out)


@pytest.mark.parametrize(("budget", "bits", "hint"), [(WIDE, 16, "lwe"), (SMALL, 8, "statistical")])
def test_what_makes_it_reproducible_and_what_was_not_tested(budget: int, bits: int, hint: str) -> None:
    found = findings(budget, bits, hint)
    assert found.scheme == "private-lora" and [attack.name for attack in found.attacks] == list(NAMES)
    assert [figure.name for figure in found.figures] == ["extraction"] and found.not_tested == NOT_TESTED
    parameters = found.parameters
    assert parameters["bundle"] == ServerManifest.read(bundle(budget, bits, hint) / "server").bundle
    assert (parameters["budget_tokens"], parameters["bits"], parameters["hint"]) == (budget, bits, hint)
    assert (parameters["columns"], parameters["rank"], parameters["seed"]) == (COLUMNS, 4, 0)


def test_without_seal_the_report_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seal", None)
    found = audit_private_lora(own_bundle(tmp_path / "out", budget=SMALL))
    assert [attack.name for attack in found.attacks] == list(NAMES[:-1])
    assert "SEAL is not installed" in found.not_tested[0] and found.not_tested[1:] == NOT_TESTED
