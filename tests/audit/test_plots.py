from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from cloven.audit.figure import Figure
from cloven.audit.plots import svg_of
from cloven.errors import BadInput

FIGURE = Figure("f", "A title", "tokens", "perplexity", {"one": [(1.0, 2.0), (10.0, 3.0)], "<two>": [(1.0, 1.0)]}, True, True, mark=2.0)


def test_an_svg_that_stands_alone() -> None:
    text = svg_of(FIGURE)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and text.startswith("<svg")
    for word in ("tokens", "perplexity", "one", "&lt;two&gt;"):
        assert word in text
    assert "<image" not in text and "<script" not in text


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert svg_of(FIGURE) == svg_of(FIGURE)


def test_many_lines_and_none() -> None:
    many = Figure("m", "t", "x", "y", {str(n): [(0.0, 1.0), (1.0, float(n))] for n in range(9)})
    assert svg_of(many).count('<g id="line2d') > 9
    assert "<svg" in svg_of(Figure("n", "t", "x", "y", {"empty": []}))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r"need Matplotlib: pip install 'cloven\[audit\]', or leave the report out with --no-report"):
        svg_of(FIGURE)


def test_figures_as_json() -> None:
    assert FIGURE.to_dict()["series"]["one"] == [(1.0, 2.0), (10.0, 3.0)] and FIGURE.to_dict()["mark"] == 2.0
