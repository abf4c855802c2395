from __future__ import annotations

from pathlib import Path

import pytest

from cloven.errors import BadInput, PeerRefused
from cloven.serving.api_error import ApiError
from cloven.serving.api_keys import ApiKeys, read_api_keys

ONE, TWO = "one-0123456789abcdefghij", "two-0123456789abcdefghij"


def stored(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_listed_keys_and_no_others(tmp_path: Path) -> None:
    keys = read_api_keys(stored(tmp_path, f"# ours\n\n{ONE}\n  {TWO}  \n"))
    for header in (f"Bearer {ONE}", f"bearer {TWO}", f"Bearer  {ONE} "):
        keys.require(header.encode())
    for header in (
        "",
        "Bearer",
        "Bearer ",
        f"Basic {ONE}",
        ONE,
        f"Bearer {ONE}x",
        f"Bearer {ONE[:-1]}",
        "Bearer # ours",
        f"Bearer {ONE} {TWO}",
    ):
        with pytest.raises(ApiError) as caught:
            keys.require(header.encode())
        assert caught.value.status == 401 and ONE not in caught.value.message


def test_a_key_does_not_show(tmp_path: Path) -> None:
    keys = read_api_keys(stored(tmp_path, f"{ONE}\n"))
    assert ONE not in repr(keys) and ONE not in repr(vars(keys))
    assert repr(ApiKeys([ONE, TWO])) == "ApiKeys(<2 keys>)"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "holds 0 API keys"),
        ("# nothing\n\n", "holds 0 API keys"),
        (f"{ONE}\nshort\n", "line 2: an API key has 20 to 256 characters"),
        (f"{ONE} {TWO}\n", "line 1"),
        ("x" * 257 + "\n", "line 1"),
        ("ключ-0123456789abcdefghij\n", "in ASCII"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        read_api_keys(stored(tmp_path, text))
    assert ONE not in str(caught.value) and "short" not in str(caught.value)


def test_a_file_that_others_can_read(tmp_path: Path) -> None:
    for mode in (0o640, 0o604, 0o660):
        with pytest.raises(PeerRefused, match="chmod 600"):
            read_api_keys(stored(tmp_path, ONE, mode))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_api_keys(tmp_path / "none")
    with pytest.raises(BadInput, match="is no file of API keys"):
        read_api_keys(tmp_path)
