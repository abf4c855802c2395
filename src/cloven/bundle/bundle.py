"""A bundle on disk: OUT/trusted and OUT/exposed, which belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloven.bundle.manifest import ExposedManifest
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.bundle.verification import verify_files


@dataclass(frozen=True)
class Bundle:
    """Both halves, by path and manifest. Guarantee: the manifests are well-formed and have the same bundle id."""

    path: Path
    manifest: TrustedManifest

    @property
    def trusted(self) -> Path:
        """The secret half: stays with the model owner."""
        return self.path / "trusted"

    @property
    def exposed(self) -> Path:
        """The half that a worker may hold."""
        return self.path / "exposed"

    @property
    def id(self) -> str:
        """The bundle id, 32 hexadecimal digits."""
        return self.manifest.bundle

    def verify(self) -> None:
        """Hash every file of both halves.

        Raises:
            TamperedBundle: names the first file that differs from its manifest.
        """
        verify_files(self.trusted, self.manifest.files)
        verify_files(self.exposed, self.manifest.exposed.files)


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle that `cloven prepare` wrote.

    Args:
        path: OUT, the folder that holds trusted/ and exposed/.

    Raises:
        BadBundle: a half is missing or malformed.  ForeignBundle: the halves do not belong together.
    """
    path = Path(path)
    manifest = TrustedManifest.read(path / "trusted")
    manifest.require_same_bundle(ExposedManifest.read(path / "exposed"), path / "exposed")
    return Bundle(path, manifest)
