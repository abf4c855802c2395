"""docs/threat-model.md is written from the docstrings of the attacks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "write_threat_model.py"
    spec = importlib.util.spec_from_file_location("write_threat_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.count(script.BEGIN) == page.count(script.END) == 1
    assert script.written(page) == page, "run scripts/write_threat_model.py"


def test_every_scheme_has_its_attacks(script: ModuleType) -> None:
    section = script.section()
    for scheme, attacks in script.ATTACKS.items():
        under = section.partition(f"### Attacks on {scheme}\n")[2].partition("\n### ")[0]
        assert under.count("- Adversary: ") == len(attacks) > 0
        assert all(f"(`{attack.__module__.removeprefix('cloven.')}`)" in under for attack in attacks)


def test_an_attack_without_its_adversary(script: ModuleType) -> None:
    module = ModuleType("cloven.audit.nothing", "What?\n\nMethod: none.")
    with pytest.raises(ValueError, match="not \\['Adversary'"):
        script.entry(module)
