from __future__ import annotations

import pytest

from cloven.serving.api_error import ApiError
from cloven.serving.replicas.sticky import HEADER, MOST, Places, Sessions

A, B = b"Bearer " + b"a" * 32, b"Bearer " + b"b" * 32


def test_names() -> None:
    sessions = Sessions()
    assert sessions.name(A, None, None) is None and sessions.name(A, None, "") is None and sessions.name(A, None, 5) is None
    given = [(A, None, "u"), (B, None, "u"), (A, None, "v"), (A, b"u", None), (A, b"v", None), (b"", None, "u"), (A, None, "ü\ud800")]
    names = [sessions.name(*one) for one in given]
    assert None not in names and len(set(names)) == len(given)
    assert names == [sessions.name(*one) for one in given]
    assert sessions.name(A, b"u", "whoever") == sessions.name(A, b"u", None)  # the header goes first


def test_what_is_hashed_does_not_run_together() -> None:
    sessions = Sessions()
    assert sessions.name(A + b"x", None, "y") != sessions.name(A, None, "xy")


def test_names_are_of_one_process() -> None:
    """And neither keys nor users stand in them, or in a repr."""
    name = Sessions().name(A, None, "somebody")
    assert name is not None and name != Sessions().name(A, None, "somebody")
    assert len(name) == 32 and b"somebody" not in name and repr(Sessions()) == "Sessions(<secret>)"


@pytest.mark.parametrize("header", [b"", b"x" * 257])
def test_no_headers(header: bytes) -> None:
    with pytest.raises(ApiError, match=f"{HEADER}: 1 to 256 bytes") as caught:
        Sessions().name(A, header, None)
    assert caught.value.status == 400


def test_places_are_bounded() -> None:
    places: Places[str] = Places(3)
    for name in (b"a", b"b", b"c"):
        places.put(name, "here")
    assert places.get(b"a") == "here"
    places.put(b"d", "there")
    assert len(places) == 3 and places.get(b"b") is None and places.get(b"a") == "here" and places.get(b"d") == "there"
    places.put(b"a", "there")
    places.forget("there")
    assert len(places) == 1 and places.get(b"a") is None and places.get(b"c") == "here"
    assert MOST <= 2**17  # each is some hundred bytes
