"""`trusted/manifest.json`: what the trusted half holds, and what it expects of the exposed half.

{format, version, scheme, bundle, files: {name: sha256}, exposed: {groups, files}, bounds: [{l1, l2}], parameters, summary}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cloven.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    NAME,
    ExposedManifest,
    exposed_fields,
    load_manifest,
    parse_exposed,
    parse_files,
    require,
)
from cloven.errors import BadBundle, BadInput, ForeignBundle
from cloven.field.codec import RowBounds

FORMAT = "cloven-trusted"


def _row_bounds(one: dict[str, Any], path: Path) -> RowBounds:
    try:
        return RowBounds(**one)
    except BadInput as error:
        raise BadBundle(f"{path}: malformed ({error})") from error


@dataclass(frozen=True)
class TrustedManifest:
    """What trusted/ holds, and what it expects of exposed/."""

    scheme: str
    exposed: ExposedManifest
    bounds: tuple[RowBounds, ...]
    files: dict[str, str]
    parameters: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def bundle(self) -> str:
        """The bundle id, 32 hexadecimal digits."""
        return self.exposed.bundle

    def write(self, folder: Path) -> None:
        """Write trusted/manifest.json (into a folder of mode 0700)."""
        record = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "scheme": self.scheme,
            "bundle": self.bundle,
            "files": self.files,
            "exposed": exposed_fields(self.exposed),
            "bounds": [asdict(bounds) for bounds in self.bounds],
            "parameters": self.parameters,
            "summary": self.summary,
        }
        path = folder / MANIFEST
        path.touch(mode=0o600)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrustedManifest:
        """Read and check trusted/manifest.json.

        Raises:
            BadBundle: missing, malformed, of another version, or its id does not match its contents.
        """
        fields = {"scheme", "bundle", "files", "exposed", "bounds", "parameters", "summary"}
        record = load_manifest(folder, FORMAT, fields)
        path = folder / MANIFEST
        require(isinstance(record["exposed"], dict) and set(record["exposed"]) == {"groups", "files"}, path, "exposed")
        exposed = parse_exposed(record["exposed"], folder)
        require(isinstance(record["scheme"], str) and NAME.fullmatch(record["scheme"]) is not None, path, "scheme")
        require(isinstance(record["parameters"], dict) and isinstance(record["summary"], dict), path, "parameters")
        require(record["bundle"] == exposed.bundle, path, "bundle")
        bounds = record["bounds"]
        require(isinstance(bounds, list) and len(bounds) == len(exposed.groups), path, "bounds")
        for one in bounds:
            require(
                isinstance(one, dict) and set(one) == {"l1", "l2"} and type(one["l1"]) is int and type(one["l2"]) is float, path, "bounds"
            )
        return cls(
            record["scheme"],
            exposed,
            tuple(_row_bounds(one, path) for one in bounds),
            parse_files(record["files"], path),
            record["parameters"],
            record["summary"],
        )

    def require_same_bundle(self, other: ExposedManifest, where: Path) -> None:
        """Refuse an exposed half of another bundle, by id."""
        if other.bundle != self.bundle:
            raise ForeignBundle(f"{where} is bundle {other.bundle}, but the trusted half belongs to bundle {self.bundle}")
