"""A figure of the report, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Lines in one plot.

    Args:
        name: for files and JSON.
        title, x, y: captions.
        series: points (x, y) of each line.
        log_x, log_y: scales.
        mark: draw a vertical line there: from here on, say, a spectrum is exposed.
        note: what a reader has to know: under which conditions, and how to read it.
    """

    name: str
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False
    mark: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
