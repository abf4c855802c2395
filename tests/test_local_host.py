from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloven.local_host import LOCAL_HOSTS, named


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:80", "localhost"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:8000", "::1"),
        ("evil.example:80", "evil.example"),
        ("localhost.evil.example", "localhost.evil.example"),
        ("localhost:80.evil.example", "localhost"),  # no browser sends that
        ("", ""),
    ],
)
def test_names(header: str, name: str) -> None:
    assert named(header) == name


@given(st.text(max_size=20))
def test_other_names_stay_other_names(label: str) -> None:
    assert named(f"{label}.example") not in LOCAL_HOSTS or ":" in label
