from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.bundle.manifest import MANIFEST, ExposedManifest
from cloven.errors import BadBundle, ClovenError
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.manifest import EXPOSED, KEYS_FILE, TRUSTED, KvManifest, bundle_id
from tests.kv_bundles import NORMED, SHAPE

LAYERS = (SHAPE, replace(NORMED, name="b"))
WEIGHTS = {"model-00001.safetensors": "a" * 64}
CONFIG = KvShieldConfig("session", 8, True)
NONCE = "5" * 32
BUNDLE = bundle_id(LAYERS, CONFIG, WEIGHTS, NONCE)
GOOD = {
    EXPOSED: KvManifest(EXPOSED, BUNDLE, NONCE, CONFIG, LAYERS, {**WEIGHTS, "config.json": "b" * 64}),
    TRUSTED: KvManifest(TRUSTED, BUNDLE, NONCE, CONFIG, LAYERS, {KEYS_FILE: "c" * 64}, 128),
}
KINDS = [EXPOSED, TRUSTED]
LAYER = json.loads(json.dumps(SHAPE.to_dict()))


def edit(folder: Path, kind: str, **change: Any) -> None:
    GOOD[kind].write(folder)
    record = {**json.loads((folder / MANIFEST).read_text(encoding="utf-8")), **change}
    record = {key: value for key, value in record.items() if value is not ...}
    (folder / MANIFEST).write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, kind: str) -> None:
    GOOD[kind].write(tmp_path)
    assert KvManifest.read(tmp_path, kind) == GOOD[kind]


def test_modes(tmp_path: Path) -> None:
    for kind, mode in ((EXPOSED, 0o644), (TRUSTED, 0o600)):
        folder = tmp_path / kind
        folder.mkdir()
        GOOD[kind].write(folder)
        assert stat.S_IMODE((folder / MANIFEST).stat().st_mode) == mode


def test_the_id_names_layers_parameters_weights_and_preparation() -> None:
    def other(layers: Any = LAYERS, config: KvShieldConfig = CONFIG, weights: Any = WEIGHTS, nonce: str = NONCE) -> bool:
        return bundle_id(layers, config, weights, nonce) != BUNDLE

    assert not other()
    assert other(LAYERS[:1]) and other(LAYERS[::-1]) and other(weights={"model-00001.safetensors": "d" * 64})
    assert other(config=KvShieldConfig("session", 16, True)) and other(config=KvShieldConfig("permute", 8, True)) and other(nonce="6" * 32)
    for change in ({"heads": 8}, {"rotary": False}, {"norm_epsilon": 1e-5}, {"output": "x"}):
        assert other((replace(SHAPE, **change), LAYERS[1]))


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"format": "cloven-exposed"},
        {"format": ...},
        {"version": 2},
        {"version": "1"},
        {"bundle": None},
        {"bundle": 3},
        {"bundle": ...},
        {"nonce": "x"},
        {"nonce": None},
        {"nonce": ...},
        {"mode": "sealed"},
        {"mode": None},
        {"mode": ["session"]},
        {"mode": ...},
        {"noise_dims": 7},
        {"noise_dims": 0},
        {"noise_dims": 1000},
        {"noise_dims": 8.0},
        {"noise_dims": True},
        {"noise_dims": "8"},
        {"seal_idle": 1},
        {"seal_idle": None},
        {"layers": []},
        {"layers": {}},
        {"layers": None},
        {"layers": [LAYER, 3]},
        {"layers": [{**LAYER, "heads": 5}]},
        {"files": {"../x": "a" * 64}},
        {"files": {"a/b": "a" * 64}},
        {"files": {"x": "a" * 63}},
        {"files": {"x": 3}},
        {"files": []},
        {"files": ...},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_malformed(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    edit(tmp_path, kind, **change)
    with pytest.raises(BadBundle, match=MANIFEST):
        KvManifest.read(tmp_path, kind)


@pytest.mark.parametrize("limit", [-1, 2**30, 128.0, True, "128", None, ...])
def test_malformed_limit(tmp_path: Path, limit: Any) -> None:
    edit(tmp_path, TRUSTED, limit=limit)
    with pytest.raises(BadBundle, match=MANIFEST):
        KvManifest.read(tmp_path, TRUSTED)


@pytest.mark.parametrize("scheme", ["slip", "", 3, None])
def test_another_scheme(tmp_path: Path, scheme: Any) -> None:
    edit(tmp_path, TRUSTED, scheme=scheme)
    with pytest.raises(BadBundle, match=MANIFEST):
        KvManifest.read(tmp_path, TRUSTED)


@pytest.mark.parametrize("bundle", ["", "zz", "0" * 31, "0" * 33, "Z" * 32])
def test_a_malformed_id(tmp_path: Path, bundle: str) -> None:
    edit(tmp_path, TRUSTED, bundle=bundle)
    with pytest.raises(BadBundle, match=MANIFEST):
        KvManifest.read(tmp_path, TRUSTED)


def test_the_keys_file_must_be_listed(tmp_path: Path) -> None:
    edit(tmp_path, TRUSTED, files={})
    with pytest.raises(BadBundle, match=MANIFEST):
        KvManifest.read(tmp_path, TRUSTED)


def test_the_exposed_id_binds_layers_and_weights(tmp_path: Path) -> None:
    for change in ({"layers": [LAYER]}, {"files": {"model-00001.safetensors": "b" * 64}}, {"files": {}}, {"bundle": "0" * 32}):
        edit(tmp_path, EXPOSED, **change)
        with pytest.raises(BadBundle, match="does not match"):
            KvManifest.read(tmp_path, EXPOSED)


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_half(tmp_path: Path, kind: str) -> None:
    GOOD[kind].write(tmp_path)
    with pytest.raises(BadBundle, match="half"):
        KvManifest.read(tmp_path, next(other for other in KINDS if other != kind))
    with pytest.raises(BadBundle):
        ExposedManifest.read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"format": NaN}', "\x00"])
def test_no_json(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(BadBundle):
        KvManifest.read(tmp_path, TRUSTED)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="cloven prepare"):
        KvManifest.read(tmp_path, EXPOSED)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["permute", "session", LAYER, BUNDLE]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["format", "version", "bundle", "mode", "noise_dims", "seal_idle", "layers", "limit", "scheme", "files"])


@settings(max_examples=150)
@given(st.sampled_from(KINDS), FIELDS, JSON)
def test_any_field_replaced(tmp_path: Path, kind: str, field: str, value: Any) -> None:
    edit(tmp_path, kind, **{field: value})
    try:
        manifest = KvManifest.read(tmp_path, kind)
    except ClovenError:
        return
    assert manifest.layers and manifest.config.noise_dims % 2 == 0 and type(manifest.limit) is int
    if kind == EXPOSED and field not in ("mode", "noise_dims", "seal_idle"):
        assert manifest == GOOD[kind]


@settings(max_examples=100)
@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(1, 255))
def test_any_byte_changed(tmp_path: Path, kind: str, place: int, flip: int) -> None:
    GOOD[kind].write(tmp_path)
    content = bytearray((tmp_path / MANIFEST).read_bytes())
    content[place % len(content)] ^= flip
    (tmp_path / MANIFEST).write_bytes(bytes(content))
    try:
        KvManifest.read(tmp_path, kind)
    except ClovenError:
        return
