"""Figures as SVG, to stand in an HTML page."""

from __future__ import annotations

import io
import re
from typing import Any

from cloven.audit.figure import Figure
from cloven.errors import BadInput

_SIZE = (6.4, 3.6)  # inches
_COLOURS = ("#2456a6", "#c0392b", "#2a9d6f", "#8e6bbf", "#d98a1f", "#5a6872")


def svg_of(figure: Figure) -> str:
    """The figure as an <svg> element, with text as text.

    Raises:
        BadInput: Matplotlib is not installed.
    """
    canvas = matplotlib_parts()
    drawing = canvas.Figure(figsize=_SIZE, layout="constrained")
    axes = drawing.subplots()
    for colour, (name, points) in zip(_COLOURS * (1 + len(figure.series) // len(_COLOURS)), figure.series.items(), strict=False):
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y, label=name, color=colour, linewidth=1.8, marker="o" if len(points) < 20 else "", markersize=4)
    if figure.log_x:
        axes.set_xscale("log")
    if figure.log_y:
        axes.set_yscale("log")
    if figure.mark is not None:
        axes.axvspan(axes.get_xlim()[0], figure.mark, color="#c0392b", alpha=0.12, linewidth=0)
        axes.axvline(figure.mark, color="#c0392b", linewidth=1, linestyle="--")
    axes.set_xlabel(figure.x)
    axes.set_ylabel(figure.y)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.StringIO()
    with canvas.rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.name}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)  # a licence of the drawing: names of other sites
    return text[text.index("<svg") :]


def matplotlib_parts() -> Any:
    """What is used of Matplotlib.

    Raises:
        BadInput: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise BadInput(
            "the report's plots need Matplotlib: pip install 'cloven[audit]', or leave the report out with --no-report"
        ) from error
    return _Matplotlib(matplotlib.figure.Figure, matplotlib.rc_context)


class _Matplotlib:
    """What is used of Matplotlib: no window, no global figure."""

    def __init__(self, figure: Any, rc_context: Any) -> None:
        self.Figure, self.rc_context = figure, rc_context
