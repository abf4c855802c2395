from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cloven.bundle.manifest import MANIFEST, ExposedGroup, ExposedManifest
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.errors import BadBundle, ForeignBundle
from cloven.field.codec import RowBounds

EXPOSED = ExposedManifest((ExposedGroup(4, 16, "exposed-00001.safetensors", "group-0", "a" * 64),), {"exposed-00001.safetensors": "c" * 64})
GOOD = TrustedManifest(
    "slip", EXPOSED, (RowBounds(100, 33.25),), {"trusted-00001.safetensors": "e" * 64}, {"rank": 3}, {"perplexity": 42.6}
)


def edit(folder: Path, **change: Any) -> None:
    GOOD.write(folder)
    record = {**json.loads((folder / MANIFEST).read_text(encoding="utf-8")), **change}
    record = {key: value for key, value in record.items() if value is not ...}
    (folder / MANIFEST).write_text(json.dumps(record), encoding="utf-8")


def test_round_trip(tmp_path: Path) -> None:
    GOOD.write(tmp_path)
    assert TrustedManifest.read(tmp_path) == GOOD
    assert GOOD.bundle == EXPOSED.bundle


def test_it_is_closed_to_others(tmp_path: Path) -> None:
    GOOD.write(tmp_path)
    assert (tmp_path / MANIFEST).stat().st_mode & 0o777 == 0o600


def test_bounds_survive_exactly(tmp_path: Path) -> None:
    # the codec's no-wrap guarantee rests on these: a rounding of l2 towards zero would break it
    exact = RowBounds(127 * 4096, math.nextafter(127 * 64.0, math.inf))
    TrustedManifest("slip", EXPOSED, (exact,), {}).write(tmp_path)
    assert TrustedManifest.read(tmp_path).bounds == (exact,)


BOUND = {"l1": 100, "l2": 33.25}


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"scheme": ...},
        {"scheme": 3},
        {"scheme": "a/b"},
        {"bundle": "0" * 32},
        {"files": {"../x": "a" * 64}},
        {"exposed": {}},
        {"exposed": None},
        {"exposed": {"groups": [], "files": {}}},
        {"exposed": {**vars(EXPOSED), "groups": [vars(EXPOSED.groups[0])], "bundle": EXPOSED.bundle}},
        {"bounds": []},
        {"bounds": [BOUND, BOUND]},
        {"bounds": [{"l1": 100}]},
        {"bounds": [{**BOUND, "extra": 0}]},
        {"bounds": [{**BOUND, "l1": 100.0}]},
        {"bounds": [{**BOUND, "l1": True}]},
        {"bounds": [{**BOUND, "l2": 33}]},
        {"bounds": [{**BOUND, "l2": math.nan}]},
        {"bounds": [{**BOUND, "l2": math.inf}]},
        {"bounds": [{**BOUND, "l2": -1.0}]},
        {"bounds": [{**BOUND, "l1": 2**31}]},
        {"bounds": {}},
        {"parameters": []},
        {"summary": None},
    ],
    ids=str,
)
def test_malformed(tmp_path: Path, change: dict[str, Any]) -> None:
    edit(tmp_path, **change)
    with pytest.raises(BadBundle, match=MANIFEST):
        TrustedManifest.read(tmp_path)


def test_the_other_half(tmp_path: Path) -> None:
    EXPOSED.write(tmp_path)
    with pytest.raises(BadBundle, match="exposed half"):
        TrustedManifest.read(tmp_path)


def test_halves_that_do_not_belong_together() -> None:
    GOOD.require_same_bundle(EXPOSED, Path("exposed"))
    GOOD.require_same_bundle(ExposedManifest(EXPOSED.groups, {}), Path("exposed"))
    other = ExposedManifest((ExposedGroup(4, 16, "exposed-00001.safetensors", "group-0", "b" * 64),), EXPOSED.files)
    with pytest.raises(ForeignBundle) as caught:
        GOOD.require_same_bundle(other, Path("exposed"))
    assert other.bundle in str(caught.value)
    assert GOOD.bundle in str(caught.value)
