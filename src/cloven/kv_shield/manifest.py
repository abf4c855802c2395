"""The manifests of a KV-Shield bundle, and the enclave's secrets on disk.

OUT/exposed/manifest.json   {format, version, bundle, nonce, mode, noise_dims, seal_idle, layers, files: {name: sha256}}
OUT/trusted/manifest.json   {format, version, scheme, bundle, nonce, mode, noise_dims, seal_idle, layers, limit, files: {name: sha256}}
OUT/trusted/keys.safetensors   permutations, the weights of the norms of q and k, the rotary embedding's frequencies

The bundle id is the first 16 bytes of the SHA-256 of the canonical JSON of the layers, the parameters, the weights' hashes and a nonce that
every preparation draws: halves of two preparations never go together, even where their weights are the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloven.bundle.manifest import FORMAT_VERSION, MANIFEST, load_manifest, parse_files, require
from cloven.bundle.verification import verify_files
from cloven.errors import BadBundle, BadInput, ForeignBundle
from cloven.kv_shield.config import KvShieldConfig
from cloven.kv_shield.shapes import AttentionShape, parse_attention

KEYS_FILE = "keys.safetensors"
SCHEME = "kv-shield"
_ID = re.compile(r"[0-9a-f]{32}")
EXPOSED, TRUSTED = "cloven-kv-exposed", "cloven-kv-trusted"
_COMMON = {"bundle", "nonce", "mode", "noise_dims", "seal_idle", "layers", "files"}


def bundle_id(layers: tuple[AttentionShape, ...], config: KvShieldConfig, weights: dict[str, str], nonce: str) -> str:
    """The id, 32 hexadecimal digits, of a bundle with these layers, parameters and weight files."""
    parts = [FORMAT_VERSION, [layer.to_dict() for layer in layers], config.to_dict(), weights, nonce]
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class KvManifest:
    """One half's manifest.

    Args:
        kind: EXPOSED or TRUSTED.
        bundle: the id, hexadecimal.
        nonce: of the preparation, 32 hexadecimal digits.
        limit: positions that the model was made for (trusted half; 0 in the exposed one).
    """

    kind: str
    bundle: str
    nonce: str
    config: KvShieldConfig
    layers: tuple[AttentionShape, ...]
    files: dict[str, str]
    limit: int = 0

    def write(self, folder: Path) -> None:
        """Write manifest.json, with mode 0600 in the trusted half."""
        record: dict[str, Any] = {
            "format": self.kind,
            "version": FORMAT_VERSION,
            "bundle": self.bundle,
            "nonce": self.nonce,
            **self.config.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "files": self.files,
        }
        if self.kind == TRUSTED:
            record |= {"scheme": SCHEME, "limit": self.limit}
        path = folder / MANIFEST
        path.touch(mode=0o600 if self.kind == TRUSTED else 0o644)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, kind: str) -> KvManifest:
        """Read and check a manifest.

        Raises:
            BadBundle: missing, malformed, of another kind or version, or its id does not match its contents.
        """
        record = load_manifest(folder, kind, _COMMON | ({"scheme", "limit"} if kind == TRUSTED else set()))
        path = folder / MANIFEST
        ids = [record["bundle"], record["nonce"]]
        require(all(isinstance(one, str) and _ID.fullmatch(one) is not None for one in ids), path, "bundle")
        require(record.get("scheme", SCHEME) == SCHEME, path, "scheme")
        require(isinstance(record["layers"], list) and len(record["layers"]) > 0, path, "layers")
        layers = tuple(parse_attention(layer, path) for layer in record["layers"])
        files = parse_files(record["files"], path)
        require(type(record["noise_dims"]) is int and type(record["seal_idle"]) is bool and isinstance(record["mode"], str), path, "mode")
        try:
            config = KvShieldConfig(record["mode"], record["noise_dims"], record["seal_idle"])
        except BadInput as error:
            raise BadBundle(f"{path}: malformed ({error})") from error
        limit = record.get("limit", 0)
        require(type(limit) is int and 0 <= limit < 2**30, path, "limit")
        require(kind == EXPOSED or KEYS_FILE in files, path, "files")
        if kind == EXPOSED:
            weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
            if record["bundle"] != bundle_id(layers, config, weights, record["nonce"]):
                raise BadBundle(f"{path}: the bundle id does not match what it lists; copy the bundle again")
        return cls(kind, record["bundle"], record["nonce"], config, layers, files, limit)


def read_halves(out: Path, *, verify: bool) -> tuple[KvManifest, KvManifest]:
    """The trusted and the exposed manifest of OUT.

    Args:
        verify: also hash every file.

    Raises:
        BadBundle, ForeignBundle, TamperedBundle: a half is missing or malformed, they do not belong together, a file differs.
    """
    trusted, exposed = KvManifest.read(out / "trusted", TRUSTED), KvManifest.read(out / "exposed", EXPOSED)
    if exposed.bundle != trusted.bundle:
        raise ForeignBundle(f"{out}: the halves are of two bundles, {exposed.bundle} and {trusted.bundle}")
    if verify:
        verify_files(out / "exposed", exposed.files)
        verify_files(out / "trusted", trusted.files)
    return trusted, exposed
