from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cloven.bundle import manifest as manifest_module
from cloven.bundle.manifest import MANIFEST, ExposedGroup, ExposedManifest
from cloven.errors import BadBundle

GROUPS = (
    ExposedGroup(4, 16, "exposed-00001.safetensors", "group-0", "a" * 64),
    ExposedGroup(9, 7, "exposed-00001.safetensors", "group-1", "b" * 64),
)
FILES = {"exposed-00001.safetensors": "c" * 64, "config.json": "d" * 64}
GOOD = ExposedManifest(GROUPS, FILES)


def edited(folder: Path, change: dict[str, Any], *, fix_id: bool = True) -> None:
    """Write the good manifest with fields changed (a value of `...` removes one), with an id that matches unless told otherwise."""
    GOOD.write(folder)
    record = {**json.loads((folder / MANIFEST).read_text(encoding="utf-8")), **change}
    record = {key: value for key, value in record.items() if value is not ...}
    if fix_id and "groups" in change:
        canonical = json.dumps([1, change["groups"]], sort_keys=True, separators=(",", ":"))
        record["bundle"] = hashlib.sha256(canonical.encode()).hexdigest()[:32]
    (folder / MANIFEST).write_text(json.dumps(record), encoding="utf-8")


def test_round_trip(tmp_path: Path) -> None:
    GOOD.write(tmp_path)
    assert ExposedManifest.read(tmp_path) == GOOD


def test_the_id_is_a_function_of_the_contents() -> None:
    assert len(GOOD.bundle) == 32
    assert ExposedManifest(GROUPS, {}).bundle == GOOD.bundle  # of the matrices, not of the files around them
    others = [
        ExposedManifest(GROUPS[:1], FILES),
        ExposedManifest(GROUPS[::-1], FILES),
        ExposedManifest((GROUPS[0], ExposedGroup(9, 7, GROUPS[1].file, "group-1", "b" * 63 + "c")), FILES),
        ExposedManifest((ExposedGroup(16, 4, *list(vars(GROUPS[0]).values())[2:]), GROUPS[1]), FILES),
    ]
    assert len({GOOD.bundle, *(other.bundle for other in others)}) == 5


def test_the_id_stays_what_it_was() -> None:
    # a change here makes every bundle on disk unreadable
    text = (
        '[1,[{"columns":16,"file":"exposed-00001.safetensors","rows":4,"sha256":"' + "a" * 64 + '","tensor":"group-0"},'
        '{"columns":7,"file":"exposed-00001.safetensors","rows":9,"sha256":"' + "b" * 64 + '","tensor":"group-1"}]]'
    )
    assert GOOD.bundle == hashlib.sha256(text.encode()).hexdigest()[:32]


def group(**changes: Any) -> list[dict[str, Any]]:
    record = {**vars(GROUPS[0]), **changes}
    return [{key: value for key, value in record.items() if value is not ...}]


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"files": ...},
        {"bundle": ...},
        {"bundle": None},
        {"groups": []},
        {"groups": {}},
        {"groups": None},
        {"groups": ["x"]},
        {"groups": group(rows=0)},
        {"groups": group(rows=-4)},
        {"groups": group(rows=True)},
        {"groups": group(rows=4.0)},
        {"groups": group(rows="4")},
        {"groups": group(columns=2**31)},
        {"groups": group(columns=...)},
        {"groups": group(extra=1)},
        {"groups": group(file="other.safetensors")},
        {"groups": group(file="../trusted/secret.safetensors")},
        {"groups": group(file=3)},
        {"groups": group(file=["exposed-00001.safetensors"])},
        {"groups": group(tensor="a/b")},
        {"groups": group(tensor="")},
        {"groups": group(tensor=None)},
        {"groups": group(sha256="A" * 64)},
        {"groups": group(sha256="a" * 63)},
        {"groups": group(sha256=5)},
        {"files": []},
        {"files": {**FILES, "../x": "a" * 64}},
        {"files": {**FILES, "/etc/passwd": "a" * 64}},
        {"files": {**FILES, ".hidden": "a" * 64}},
        {"files": {**FILES, "a\n": "a" * 64}},
        {"files": {**FILES, "": "a" * 64}},
        {"files": {**FILES, "x" * 129: "a" * 64}},
        {"files": {**FILES, "x": "short"}},
        {"files": {**FILES, "x": None}},
        {"files": {}},
    ],
    ids=str,
)
def test_malformed(tmp_path: Path, change: dict[str, Any]) -> None:
    edited(tmp_path, change)
    with pytest.raises(BadBundle, match=MANIFEST):
        ExposedManifest.read(tmp_path)


def test_an_id_that_does_not_match(tmp_path: Path) -> None:
    edited(tmp_path, {"groups": group()}, fix_id=False)
    with pytest.raises(BadBundle, match="does not match"):
        ExposedManifest.read(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None, ...])
def test_another_version(tmp_path: Path, version: object) -> None:
    edited(tmp_path, {"version": version})
    with pytest.raises(BadBundle, match="version"):
        ExposedManifest.read(tmp_path)


def test_the_other_half(tmp_path: Path) -> None:
    edited(tmp_path, {"format": "cloven-trusted"})
    with pytest.raises(BadBundle, match="trusted half"):
        ExposedManifest.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe{", b"[" * 100_000, b'{"format": "cloven-exposed"}'])
def test_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BadBundle):
        ExposedManifest.read(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="cloven prepare"):
        ExposedManifest.read(tmp_path)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(BadBundle):
        ExposedManifest.read(tmp_path)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GOOD.write(tmp_path)
    monkeypatch.setattr(manifest_module, "_MAX_MANIFEST_BYTES", 100)
    with pytest.raises(BadBundle, match="larger"):
        ExposedManifest.read(tmp_path)
