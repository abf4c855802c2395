"""How an exposed half is spread over several workers. No secrets: both sides compute it from the manifest.

layers:2/3    the second of three workers: whole groups, in order, cut so that all hold about the same number of bytes
rows:2/3      the second of three workers: the second third of the output rows of every group (tensor parallel)
(nothing)     everything
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from cloven.bundle.manifest import ExposedGroup
from cloven.errors import BadInput

KINDS = ("layers", "rows")
MOST_PARTS = 4096
PART = re.compile(r"(layers|rows):([1-9][0-9]{0,3})/([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Part:
    """What one worker holds: part `number` (from 1) of `of`; `kind` is "" for everything."""

    kind: str = ""
    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}/{self.of}" if self.kind else ""

    def rows(self, group: int, groups: Sequence[ExposedGroup]) -> range:
        """The rows of a group that this part holds; empty if none."""
        height = groups[group].rows
        if self.kind == "layers":
            return range(height) if group in _cut(groups, self.number, self.of) else range(0)
        return range(height * (self.number - 1) // self.of, height * self.number // self.of)


WHOLE = Part()


def parse_part(text: str) -> Part:
    """`KIND:NUMBER/OF`, or "" for everything, which the first part of one is too.

    Raises:
        BadInput: anything else.
    """
    if text == "":
        return WHOLE
    match = PART.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= MOST_PARTS:
        raise BadInput(f"part {text!r}: give layers:NUMBER/OF or rows:NUMBER/OF, for example layers:1/2")
    return Part(match[1], int(match[2]), int(match[3])) if int(match[3]) > 1 else WHOLE


def parts(kind: str, of: int, groups: Sequence[ExposedGroup]) -> list[Part]:
    """All parts of a placement.

    Raises:
        BadInput: more parts than there are groups, or rows in the narrowest group.
    """
    most = len(groups) if kind == "layers" else min(group.rows for group in groups)
    if kind not in KINDS or not 1 <= of <= min(most, MOST_PARTS):
        raise BadInput(f"placement {kind!r} over {of} workers: this bundle can be spread over {most} at most")
    return [Part(kind, number, of) for number in range(1, of + 1)]


def _cut(groups: Sequence[ExposedGroup], number: int, of: int) -> range:
    """Groups of a part."""
    starts = _starts(tuple(group.rows * group.columns for group in groups), of)
    return range(starts[number - 1], starts[number])


@lru_cache(maxsize=8)
def _starts(sizes: tuple[int, ...], of: int) -> tuple[int, ...]:
    """Where the parts begin: every boundary where the bytes before it come nearest to their share, and no part empty."""
    before = [0, *accumulate(sizes)]
    starts = [0]
    for part in range(1, of):
        candidates = range(starts[-1] + 1, len(sizes) - (of - part) + 1)
        starts.append(min(candidates, key=lambda index: abs(before[index] * of - before[-1] * part)))
    return (*starts, len(sizes))
