"""Figures as SVG, to stand in an HTML page."""

from __future__ import annotations

import io
import re
from typing import Any

from cloven.audit.figure import Figure
from cloven.errors import BadInput

_SIZE, _LINE = (6.4, 3.6), 0.11  # inches; and for every line that is named below the plot
_MOST_INSIDE = 2  # lines whose names fit in the plot
_WIDTHS = (3.2, 2.4, 1.8, 1.2)  # lines that lie on each other are seen
_STYLES = ("-", "--", ":")
_COLOURS = ("#2456a6", "#c0392b", "#2a9d6f", "#8e6bbf", "#d98a1f", "#5a6872")


def svg_of(figure: Figure) -> str:
    """The figure as an <svg> element, with text as text.

    Raises:
        BadInput: Matplotlib is not installed.
    """
    canvas = matplotlib_parts()
    below = len(figure.series) > _MOST_INSIDE  # beside, they would be cut off on a small screen
    size = (_SIZE[0], _SIZE[1] + _LINE * len(figure.series)) if below else _SIZE
    drawing = canvas.Figure(figsize=size, layout="constrained")
    axes = drawing.subplots()
    for number, (name, points) in enumerate(figure.series.items()):
        x, y = zip(*points, strict=True) if points else ((), ())
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]
        marker = "o" if len(points) < 20 else ""
        axes.plot(
            x,
            y,
            label=name.replace("_", " "),
            color=colour,
            linestyle=style,
            linewidth=_WIDTHS[number % len(_WIDTHS)],
            marker=marker,
            markersize=4,
        )
    if figure.log_x:
        axes.set_xscale("log")
    if figure.log_y:
        axes.set_yscale("log")
    if figure.mark is not None:
        axes.axvspan(min(x for points in figure.series.values() for x, _ in points), figure.mark, color="#c0392b", alpha=0.12, linewidth=0)
        axes.axvline(figure.mark, color="#c0392b", linewidth=1, linestyle="--")
    axes.set_xlabel(figure.x)
    axes.set_ylabel(figure.y)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if below:
        drawing.legend(frameon=False, fontsize=8, handlelength=3, loc="outside lower center", ncols=2)
    else:
        axes.legend(frameon=False, fontsize=9, handlelength=3)
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
