from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloven.errors import BadInput
from cloven.serving.options import ServeOptions


def test_the_defaults_are_this_machine_alone() -> None:
    options = ServeOptions()
    assert options.local and options.url == "http://127.0.0.1" and options.api_key_file is None
    assert options.rows == options.batch_rows == 256
    assert ServeOptions(constant_rows=64).rows == 64


def test_addresses() -> None:
    assert ServeOptions(host="::1").url == "http://[::1]" and ServeOptions(host="localhost").local
    secure = ServeOptions(tls_certificate=Path("c"), tls_key=Path("k"))
    assert secure.url == "https://127.0.0.1"
    open_to_all = ServeOptions(host="0.0.0.0", insecure_open=True)
    assert not open_to_all.local
    assert not ServeOptions(host="10.0.0.1", api_key_file=Path("keys")).local


def test_a_page_where_only_this_machine_can_connect_or_where_it_is_asked_for() -> None:
    network: dict[str, Any] = {"host": "10.0.0.1", "api_key_file": Path("keys")}
    assert ServeOptions().with_page and not ServeOptions(page=False).with_page
    assert not ServeOptions(**network).with_page and ServeOptions(page=True, compare=Path("model"), **network).with_page


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"port": 65_536}, "port 65536"),
        ({"port": -1}, "port -1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_queue": -1}, "max_queue"),
        ({"max_body": 0}, "max_body"),
        ({"max_body": 2**40}, "max_body"),
        ({"max_running": 0}, "max_running"),
        ({"batch_rows": 15}, "batch_rows: at least max_running"),
        ({"cache_tokens": 15}, "cache_tokens"),
        ({"constant_rows": 15}, "constant_rows 15: at least one row for each of the 16"),
        ({"tls_key": Path("k")}, "both a certificate and its key"),
        ({"host": "0.0.0.0"}, "--api-key-file FILE, or --insecure-open"),
        ({"page": False, "compare": Path("model")}, "give --page"),
        ({"host": "10.0.0.1", "api_key_file": Path("keys"), "compare": Path("model")}, "give --page"),
        ({"host": "::"}, "can be reached from the network"),
    ],
)
def test_contradictions(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        ServeOptions(**options)
