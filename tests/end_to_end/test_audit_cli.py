"""`cloven audit` of a SLIP bundle, as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.commands import Command, one_line
from tests.split_models import tiny_bundle

KEYS = {"name", "scheme", "adversary", "metric", "value", "chance", "weakened_value", "tries", "verdict", "interval", "details"}
SECRETS = {"transcript_uniform", "transcript_repeated_prompt", "transcript_neighbours", "plaintext_adjacency", "liar"}  # fresh at every run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("llama").path, tmp_path / "out"))


def test_json_and_a_report(out: Path, cloven_here: Command) -> None:
    outcome = cloven_here("audit", str(out), "--budget-minutes", "0.01", "--seed", "3", "--json")
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    assert set(answer) == {"version", "scheme", "attacks", "figures", "parameters", "not_tested", "report"}
    assert all(set(attack) == KEYS for attack in answer["attacks"]) and len(answer["attacks"]) >= 12
    assert {"recovery_full", "recovery_low_rank", "recovery_scrambled"} <= {attack["name"] for attack in answer["attacks"]}
    page = out / "audit.html"
    assert answer["report"] == str(page) and page.stat().st_mode & 0o777 == 0o600
    text = page.read_text(encoding="utf-8")
    assert "Recovery by training" in text and "http" not in text.replace("http://www.w3.org/", "")


def test_a_table_and_the_same_numbers_for_one_seed(out: Path, tmp_path: Path, cloven_here: Command) -> None:
    values = []
    for number in range(2):
        page = tmp_path / f"{number}.html"
        outcome = cloven_here("audit", str(out), "--budget-minutes", "0", "--json", "--report", str(page))
        assert page.exists() and not (out / "audit.html").exists()
        values.append({(a["name"], a["scheme"]): a["value"] for a in json.loads(outcome.out)["attacks"] if a["name"] not in SECRETS})
    assert values[0] == values[1]
    outcome = cloven_here("audit", str(out), "--budget-minutes", "0", "--no-report")
    assert outcome.code == 0 and "liar" in outcome.out and "report:" not in outcome.out


def test_what_is_wrong_is_named(out: Path, tmp_path: Path, cloven_here: Command) -> None:
    one_line(cloven_here("audit", str(out), "--text", str(tmp_path / "none")), 2, "cannot be read as text")
    one_line(cloven_here("audit", str(tmp_path / "nowhere"), "--text", str(tmp_path / "none")), 2, "no bundle here with both halves")
    one_line(cloven_here("audit", str(out), "--report", str(tmp_path)), 2, "cannot be written there")
    with next((out / "exposed").glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    one_line(cloven_here("audit", str(out), "--no-report"), 3, "exposed")
