"""`cloven audit` of a SLIP bundle, as a user runs it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloven.audit import registry
from cloven.audit.findings import Findings
from cloven.audit.slip import audit as module
from cloven.audit.slip import training
from cloven.errors import RunError
from tests.end_to_end.commands import Command, one_line
from tests.split_models import tiny_bundle

KEYS = {"name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict", "interval", "details"}
SECRETS = {
    "transcript_uniform",
    "transcript_repeated_prompt",
    "transcript_neighbours",
    "plaintext_adjacency",
    "liar",
    "liar_in_session",
}  # fresh at every run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("llama").path, tmp_path / "out"))


def values(answer: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(attack["name"], attack["scheme"]): attack["value"] for attack in answer["attacks"] if attack["name"] not in SECRETS}


def test_what_is_printed_and_the_same_numbers_for_one_seed(
    out: Path, tmp_path: Path, cloven_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, found = tmp_path / "page.html", list[Findings]()
    attack = registry.audit
    monkeypatch.setattr(registry, "audit", lambda *given, **options: found.append(attack(*given, **options)) or found[-1])
    monkeypatch.setattr(training, "MOST_SEQUENCES", 16)  # sampling text would take longer than all trainings
    monkeypatch.setattr(training, "RATES", (1e-3,))
    outcome = cloven_here("audit", str(out), "--steps", "3", "--seed", "3", "--json")
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    assert set(answer) == {"version", "scheme", "attacks", "figures", "parameters", "not_tested", "report"}
    assert all(set(attack) == KEYS for attack in answer["attacks"]) and len(answer["attacks"]) >= 12
    assert {"recovery_full", "recovery_low_rank", "recovery_scrambled"} <= {attack["name"] for attack in answer["attacks"]}
    page = out / "audit.html"
    assert answer["report"] == str(page) and page.stat().st_mode & 0o777 == 0o600
    text = page.read_text(encoding="utf-8")
    assert "Recovery by training" in text and "http" not in text.replace("http://www.w3.org/", "")
    page.unlink()
    # the same seed, nothing trained, none of the attacks with a worker, whose numbers are fresh at every run; a report elsewhere
    seeded = tuple(one for one in module.ATTACKS if one.__name__ not in ("plaintext_adjacency", "transcripts", "liars", "lies_in_sessions"))
    assert len(seeded) == len(module.ATTACKS) - 4
    monkeypatch.setattr(module, "ATTACKS", seeded)
    outcome = cloven_here("audit", str(out), "--budget-minutes", "0", "--seed", "3", "--json", "--report", str(elsewhere))
    assert elsewhere.exists() and not page.exists() and outcome.code == 0, outcome.err
    again = values(json.loads(outcome.out))
    assert len(again) >= 8 and again.items() <= values(answer).items()
    # a table of what was found; an attack that failed comes last, and the exit code says so
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(registry, "audit", lambda *_, **options: asked.append(options) or found[0])
    outcome = cloven_here("audit", str(out), "--budget-minutes", "0", "--no-report")
    assert outcome.code == 0 and "liar" in outcome.out and "report:" not in outcome.out
    assert "not tested: Side channels" in outcome.out and "holds: Malicious worker" in outcome.out
    late = replace(found[0], failed=(RunError("Transcripts: the worker is gone"),))
    monkeypatch.setattr(registry, "audit", lambda *_, **options: late)
    outcome = cloven_here("audit", str(out), "--json")
    assert outcome.code == 1 and len(json.loads(outcome.out)["attacks"]) >= 12 and "the worker is gone" in outcome.err
    page.unlink()
    assert (asked[0]["seed"], asked[0]["budget"]) == (0, training.Budget(0)) and not page.exists()


@pytest.mark.long
def test_a_table_and_the_same_numbers_without_a_seed(out: Path, tmp_path: Path, cloven_here: Command) -> None:
    found = []
    for number in range(2):
        page = tmp_path / f"{number}.html"
        outcome = cloven_here("audit", str(out), "--budget-minutes", "0", "--json", "--report", str(page))
        assert page.exists() and not (out / "audit.html").exists()
        found.append(values(json.loads(outcome.out)))
    assert found[0] == found[1]
    outcome = cloven_here("audit", str(out), "--budget-minutes", "0", "--no-report")
    assert outcome.code == 0 and "liar" in outcome.out and "report:" not in outcome.out


def test_what_is_wrong_is_named(out: Path, tmp_path: Path, cloven_here: Command) -> None:
    one_line(cloven_here("audit", str(out), "--text", str(tmp_path / "none")), 2, "cannot be read as text")
    one_line(cloven_here("audit", str(tmp_path / "nowhere"), "--text", str(tmp_path / "none")), 2, "no bundle here with both halves")
    one_line(cloven_here("audit", str(out), "--report", str(tmp_path)), 2, "cannot be written there")
    one_line(cloven_here("audit", str(out), "--steps", "5", "--budget-minutes", "1"), 2, "--steps beside --budget-minutes")
    for option, value in (("--seed", "99999999999999999999999"), ("--budget-minutes", "inf")):
        outcome = cloven_here("audit", str(out), option, value)
        assert outcome.code == 2 and "Traceback" not in outcome.err
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    one_line(cloven_here("audit", str(out), "--report", str(kept)), 2, "exists and is no report: it is not overwritten")
    assert kept.read_text() == "mine"
    (tmp_path / "link.html").symlink_to(kept)
    one_line(cloven_here("audit", str(out), "--report", str(tmp_path / "link.html")), 2, "cannot be written there")
    one_line(cloven_here("audit", str(out), "--report", "/dev/null"), 2, "cannot be written there")
    manifest = out / "trusted" / "manifest.json"
    for inside in (manifest, out / "exposed" / "new.html"):
        one_line(cloven_here("audit", str(out), "--report", str(inside)), 2, "that is inside the bundle")
    with next((out / "exposed").glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    one_line(cloven_here("audit", str(out), "--no-report"), 3, "exposed")
