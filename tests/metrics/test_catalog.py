"""The table in docs/metrics.md is the catalogue, and both lists of events are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import cloven
from cloven.metrics.catalog import BY_NAME, METRICS

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
SOURCE = Path(cloven.__file__).parent


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table with this heading."""
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_documented_metrics_are_the_published_ones() -> None:
    assert rows("| name | kind |") == [[f"`{m.name}`", m.kind, ", ".join(m.labels), m.where, m.help] for m in METRICS]


def test_names() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"cloven_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert "|" not in metric.help and metric.help.endswith(".")


def test_every_name_in_the_code_is_in_the_catalogue() -> None:
    for path in SOURCE.rglob("*.py"):
        for name in re.findall(r"Sample\(\s*\"(cloven_\w+)\"", path.read_text(encoding="utf-8")):
            assert name in BY_NAME, path


def test_the_documented_events_are_the_logged_ones() -> None:
    documented = {name for row in rows("| event | level |") for name in re.findall(r"`(\w+)`", row[0])} - {"message"}
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    logged = set(re.findall(r"(?:log_event\(\s*logging\.\w+,|self\._tell\()\s*\"(\w+)\"", source))
    assert documented == logged
