from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.serving.stop_strings import StopStrings, cut

LETTERS = st.text(alphabet="ab", max_size=12)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello world", ["o"], ("hell", True)),
        ("hello world", ["xyz"], ("hello world", False)),
        ("hello world", ["world", "lo"], ("hel", True)),
        ("hello", [], ("hello", False)),
        ("hello", ["hello"], ("", True)),
    ],
)
def test_cut(text: str, stops: list[str], expected: tuple[str, bool]) -> None:
    assert cut(text, stops) == expected


@given(st.lists(LETTERS, max_size=8), st.lists(LETTERS.filter(bool), max_size=3))
def test_in_pieces_it_is_the_same_as_at_once(pieces: list[str], stops: list[str]) -> None:
    """Whatever the pieces: what was written is the text before the first stop string, and nothing of a stop string ever was."""
    filtered = StopStrings(stops)
    written = ""
    for piece in pieces:
        written += filtered.push(piece)
        assert "".join(pieces).startswith(written)
        if filtered.found:
            break
    written += filtered.flush()
    seen = "".join(pieces)
    if filtered.found:
        assert any(seen[len(written) :].startswith(stop) for stop in stops)
        assert not any(stop in written for stop in stops)
    else:
        assert written == seen and not any(stop in seen for stop in stops)


def test_what_may_be_a_beginning_is_held_back_and_no_more() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the E") == "the "
    assert stops.push("N") == ""
    assert stops.push("!") == "EN!"
    assert stops.push("x E") == "x "
    assert stops.flush() == "E" and not stops.found
    assert stops.push("ENDing") == "" and stops.found
    assert stops.push("more") == "" and stops.flush() == ""
