from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloven.errors import BadInput, PeerRefused
from cloven.wire.address import check_socket_folder, parse_address


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("inproc://worker", "inproc"),
        ("ipc:///run/user/1000/cloven/worker", "ipc"),
        ("tcp://127.0.0.1:5555", "tcp"),
        ("tcp://worker-3.example.org:1", "tcp"),
        ("tcp://*:65535", "tcp"),
    ],
)
def test_addresses(text: str, scheme: str) -> None:
    address = parse_address(text)
    assert (address.scheme, str(address)) == (scheme, text)
    assert (address.path is not None) == (scheme == "ipc")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ipc",
        "ipc://",
        "ipc://relative/path",
        "ipc://@abstract",
        "ipc:///a b",
        "ipc:///a\nb",
        "ipc:///a\x1b[2J",
        "ipc:///" + "x" * 107,
        "ipc:///" + "é" * 60,  # 107 is a number of bytes
        "udp://127.0.0.1:5",
        "TCP://127.0.0.1:5",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:123456",
        "tcp://127.0.0.1:80/path",
        "tcp://user@host:80",
        "tcp://:80",
        "tcp://a;b:80",
        "file:///etc/passwd",
    ],
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(BadInput):
        parse_address(text)


def test_the_longest_path() -> None:
    assert parse_address("ipc:///" + "x" * 106).path == Path("/" + "x" * 106)


def test_folder_is_made_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        check_socket_folder(parse_address(f"ipc://{tmp_path}/s/w"), create=True)
    finally:
        os.umask(old)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700


def test_a_missing_folder_is_not_made_by_the_side_that_connects(tmp_path: Path) -> None:
    check_socket_folder(parse_address(f"ipc://{tmp_path}/s/w"), create=False)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770, 0o777])
@pytest.mark.parametrize("create", [True, False])
def test_a_folder_that_others_can_reach(tmp_path: Path, mode: int, create: bool) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PeerRefused, match="others can reach"):
        check_socket_folder(parse_address(f"ipc://{folder}/w"), create=create)


def test_somebody_elses_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PeerRefused):
        check_socket_folder(parse_address(f"ipc://{folder}/w"), create=False)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(BadInput, match="cannot be made"):
        check_socket_folder(parse_address(f"ipc://{tmp_path}/s/w"), create=True)


def test_other_schemes_have_no_folder() -> None:
    check_socket_folder(parse_address("tcp://127.0.0.1:5555"), create=True)
    check_socket_folder(parse_address("inproc://x"), create=True)
