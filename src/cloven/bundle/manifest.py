"""`exposed/manifest.json`, and what both manifests share: strict schemas, one version, a bundle id in both halves.

    {format, version, bundle, groups: [{rows, columns, file, tensor, sha256}], files: {name: sha256}}

The bundle id is the first 16 bytes of the SHA-256 of the canonical JSON of the exposed groups and their hashes: it names contents,
so an id in two manifests means the same matrices. Group numbers and shapes are all that the exposed half says about the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloven.errors import BadBundle

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 * 2**20
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{32}")
_LARGEST = 2**31


@dataclass(frozen=True)
class ExposedGroup:
    """An int8 matrix [rows, columns] of the exposed half; `sha256` is that of its bytes, row-major."""

    rows: int
    columns: int
    file: str
    tensor: str
    sha256: str


@dataclass(frozen=True)
class ExposedManifest:
    """What exposed/ holds."""

    groups: tuple[ExposedGroup, ...]
    files: dict[str, str]

    @property
    def bundle(self) -> str:
        """The bundle id, 32 hexadecimal digits."""
        canonical = json.dumps([FORMAT_VERSION, [asdict(group) for group in self.groups]], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def write(self, folder: Path) -> None:
        """Write exposed/manifest.json."""
        record = {"format": "cloven-exposed", "version": FORMAT_VERSION, "bundle": self.bundle, **exposed_fields(self)}
        (folder / MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ExposedManifest:
        """Read and check exposed/manifest.json.

        Raises:
            BadBundle: missing, malformed, of another version, or its id does not match its contents.
        """
        record = load_manifest(folder, "cloven-exposed", {"bundle", "groups", "files"})
        manifest = parse_exposed(record, folder)
        if record["bundle"] != manifest.bundle:
            raise BadBundle(f"{folder / MANIFEST}: the bundle id does not match the groups it lists; copy the bundle again")
        return manifest


def exposed_fields(manifest: ExposedManifest) -> dict[str, Any]:
    """The part that both manifests hold, as JSON."""
    return {"groups": [asdict(group) for group in manifest.groups], "files": manifest.files}


def manifest_format(folder: Path) -> str:
    """The `format` that a folder's manifest states; "" where there is none that can be read."""
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MAX_MANIFEST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return ""
    return str(record.get("format", "")) if isinstance(record, dict) else ""


def load_manifest(folder: Path, kind: str, fields: set[str]) -> dict[str, Any]:
    """Read a manifest of one kind and version with exactly these fields besides `format` and `version`."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BadBundle(f"{path}: larger than a manifest can be")
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadBundle(f"{folder} is no bundle half: it has no {MANIFEST}; make one with `cloven prepare`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadBundle(f"{path}: not readable as JSON") from error
    if not isinstance(record, dict) or record.get("format") != kind:
        other = "the trusted half" if kind.endswith("exposed") else "the exposed half"
        raise BadBundle(f"{path}: expected a '{kind}' manifest; is this {other}, a bundle of another scheme, or not a bundle at all?")
    if record.get("version") != FORMAT_VERSION:
        raise BadBundle(f"{path}: format version {record.get('version')!r}, this cloven reads version {FORMAT_VERSION}")
    require(set(record) == fields | {"format", "version"}, path, "the set of fields")
    return record


def require(condition: bool, path: Path, what: str) -> None:
    """Refuse a manifest whose part `what` is malformed."""
    if not condition:
        raise BadBundle(f"{path}: malformed ({what})")


def parse_files(value: object, path: Path) -> dict[str, str]:
    """File names (no folders) and their SHA-256."""
    require(isinstance(value, dict), path, "files")
    assert isinstance(value, dict)
    for name, digest in value.items():
        require(NAME.fullmatch(name) is not None, path, "a file name")
        require(isinstance(digest, str) and _SHA256.fullmatch(digest) is not None, path, "a sha256")
    return value


def parse_exposed(record: dict[str, Any], folder: Path) -> ExposedManifest:
    """The groups and files of an exposed half."""
    path = folder / MANIFEST
    files = parse_files(record["files"], path)
    groups = record["groups"]
    require(isinstance(groups, list) and len(groups) > 0, path, "groups")
    for group in groups:
        require(isinstance(group, dict) and set(group) == set(ExposedGroup.__dataclass_fields__), path, "a group")
        sizes_valid = all(type(group[name]) is int and 0 < group[name] < _LARGEST for name in ("rows", "columns"))
        require(sizes_valid, path, "a group's shape")
        require(isinstance(group["tensor"], str) and NAME.fullmatch(group["tensor"]) is not None, path, "a tensor name")
        require(isinstance(group["file"], str) and group["file"] in files, path, "a group's file")
        require(isinstance(group["sha256"], str) and _SHA256.fullmatch(group["sha256"]) is not None, path, "a sha256")
    return ExposedManifest(tuple(ExposedGroup(**group) for group in groups), files)
