"""The manifests of a private-LoRA bundle.

OUT/client/manifest.json   {format, version, scheme, bundle, nonce, specification, bits, hint, base, base_name, groups, signer, files}
OUT/client/manifest.sig    Ed25519 over the bytes of manifest.json, hexadecimal
OUT/server/manifest.json   {format, version, scheme, bundle, specification, bits, hint, adapter, ledger, groups, files}

A client group is {columns, l2, modules: [{name, outputs, rank}]}, a server group {name, rows, columns, entropy}. The bundle id is the
first 16 bytes of the SHA-256 of the canonical JSON of what the client gets and a nonce. The client pins the SHA-256 of its manifest, which
holds the hashes of the hints: one public value for all users, so that the server cannot tag them. Without a pin the signature tells only
that the bundle is whole: the signer's key stands in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloven.bundle.manifest import FORMAT_VERSION, MANIFEST, load_manifest, parse_files, require
from cloven.bundle.verification import verify_files
from cloven.errors import BadBundle, BadInput, ForeignBundle, TamperedBundle
from cloven.masks.lwe_parameters import SPECIFICATION, LweParameters, lwe_parameters
from cloven.private_lora.config import FEWEST_BITS, MOST_BITS, TERMS

SCHEME = "private-lora"
CLIENT, SERVER = "cloven-lora-client", "cloven-lora-server"
SIGNATURE = "manifest.sig"
SERVER_FILE = "adapter.safetensors"
_HEX16, _HEX32 = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")
_MODULE = re.compile(r"[A-Za-z0-9_.]{1,256}")
_COMMON = {"scheme", "bundle", "specification", "bits", "hint", "groups", "files"}
_LARGEST_SIDE = 2**24


@dataclass(frozen=True)
class ClientModule:
    """One adapted linear: its name in the base, its outputs N and the rank r."""

    name: str
    outputs: int
    rank: int


@dataclass(frozen=True)
class ClientGroup:
    """Adapted linears that share an input of K = `columns` numbers; `l2` bounds the norms of the integer rows."""

    columns: int
    l2: int
    modules: tuple[ClientModule, ...]

    @property
    def rows(self) -> int:
        """Integer rows of the group: two terms of every row of every module."""
        return TERMS * sum(module.rank for module in self.modules)

    @property
    def name(self) -> str:
        """For statistics and errors; the ledger charges each of the modules that it names."""
        return "+".join(module.name for module in self.modules)


@dataclass(frozen=True)
class ClientManifest:
    """What the client's half holds."""

    bundle: str
    nonce: str
    bits: int
    hint: str
    base: str
    base_name: str
    groups: tuple[ClientGroup, ...]
    signer: str
    files: dict[str, str]

    @property
    def parameters(self) -> LweParameters:
        """Of the encryption."""
        return lwe_parameters(self.hint)

    def write(self, folder: Path, key: Ed25519PrivateKey) -> str:
        """Write and sign; returns the fingerprint to pin."""
        record = {"format": CLIENT, "version": FORMAT_VERSION, "scheme": SCHEME, "specification": SPECIFICATION, **asdict(self)}
        data = (json.dumps(record, indent=1) + "\n").encode()
        (folder / MANIFEST).write_bytes(data)
        (folder / SIGNATURE).write_text(key.sign(data).hex() + "\n", encoding="ascii")
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> ClientManifest:
        """Read, check the signature, check the schema.

        Raises:
            BadBundle: missing or malformed, or made for another specification.  TamperedBundle: the signature is wrong.
        """
        record = load_manifest(folder, CLIENT, _COMMON | {"nonce", "base", "base_name", "signer"})
        path = folder / MANIFEST
        _check_common(record, path)
        for name, pattern in (("nonce", _HEX16), ("base", _HEX32), ("signer", _HEX32)):
            require(isinstance(record[name], str) and pattern.fullmatch(record[name]) is not None, path, name)
        _verify_signature(folder, record["signer"])
        require(isinstance(record["base_name"], str) and len(record["base_name"]) <= 256, path, "base_name")
        groups = tuple(_parse_group(group, path) for group in record["groups"])
        names = [module.name for group in groups for module in group.modules]
        require(len(set(names)) == len(names), path, "a module that is named twice")
        manifest = cls(
            record["bundle"],
            record["nonce"],
            record["bits"],
            record["hint"],
            record["base"],
            record["base_name"],
            groups,
            record["signer"],
            parse_files(record["files"], path),
        )
        if client_bundle_id(manifest) != manifest.bundle:
            raise BadBundle(f"{path}: the bundle id does not match what it lists; copy the bundle again")
        return manifest


@dataclass(frozen=True)
class ServerGroup:
    """The integer matrix W' [rows, columns] of a group, pad columns included; `entropy`: see `Quantised`."""

    name: str
    rows: int
    columns: int
    entropy: float


@dataclass(frozen=True)
class ServerManifest:
    """What the server's half holds; `ledger` is the ledger's path, relative to the half where it lies inside."""

    bundle: str
    bits: int
    hint: str
    adapter: str
    ledger: str
    groups: tuple[ServerGroup, ...]
    files: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write, with mode 0600."""
        record = {"format": SERVER, "version": FORMAT_VERSION, "scheme": SCHEME, "specification": SPECIFICATION, **asdict(self)}
        path = folder / MANIFEST
        path.touch(mode=0o600)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ServerManifest:
        """Read and check.

        Raises:
            BadBundle: missing or malformed, or made for another specification.
        """
        record = load_manifest(folder, SERVER, _COMMON | {"adapter", "ledger"})
        path = folder / MANIFEST
        _check_common(record, path)
        require(isinstance(record["adapter"], str) and _HEX32.fullmatch(record["adapter"]) is not None, path, "adapter")
        require(isinstance(record["ledger"], str) and 0 < len(record["ledger"]) < 4096, path, "ledger")
        for group in record["groups"]:
            require(isinstance(group, dict) and set(group) == {"name", "rows", "columns", "entropy"}, path, "a group")
            require(isinstance(group["name"], str) and 0 < len(group["name"]) < 65_536, path, "a group's name")
            require(all(_is_side(group[name]) for name in ("rows", "columns")), path, "a group's shape")
            require(type(group["entropy"]) is float and 0 <= group["entropy"] <= 8, path, "a group's entropy")
        groups = tuple(ServerGroup(**group) for group in record["groups"])
        files = parse_files(record["files"], path)
        require(SERVER_FILE in files and len({group.name for group in groups}) == len(groups), path, "files")
        return cls(record["bundle"], record["bits"], record["hint"], record["adapter"], record["ledger"], groups, files)

    @property
    def parameters(self) -> LweParameters:
        """Of the encryption."""
        return lwe_parameters(self.hint)

    def ledger_path(self, folder: Path) -> Path:
        """Where the ledger is."""
        return (folder / self.ledger).resolve()


def client_bundle_id(manifest: ClientManifest) -> str:
    """The id of a bundle with these contents, 32 hexadecimal digits."""
    record = asdict(manifest)
    weights = {name: digest for name, digest in record.pop("files").items() if name.endswith(".safetensors")}
    del record["bundle"], record["base_name"]
    canonical = json.dumps([FORMAT_VERSION, SPECIFICATION, record, weights], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def read_client(folder: Path, pin: str | None = None) -> ClientManifest:
    """The client's manifest, compared with a pinned fingerprint.

    Raises:
        BadInput: the pin is no SHA-256.  ForeignBundle: it is another bundle's.  BadBundle, TamperedBundle: see `ClientManifest.read`.
    """
    manifest = ClientManifest.read(folder)
    if pin is not None:
        if not _HEX32.fullmatch(pin.lower()):
            raise BadInput("the pin is no fingerprint: give the 64 hexadecimal digits that `cloven prepare private-lora` printed")
        found = fingerprint(folder)
        if found != pin.lower():
            raise ForeignBundle(f"{folder}: the bundle's fingerprint is {found}, pinned is {pin.lower()}: do not use it")
    return manifest


def verify_client(folder: Path, manifest: ClientManifest) -> None:
    """Hash every file of the client's half; what could steer a model or its tokenizer and is not listed is refused.

    Raises:
        BadBundle, TamperedBundle: names the file.
    """
    verify_files(folder, manifest.files)
    for path in sorted(folder.iterdir()):
        steers = path.suffix in (".json", ".jinja", ".txt", ".model", ".py", ".safetensors") and path.name != MANIFEST
        if steers and path.name not in manifest.files:
            raise TamperedBundle(f"{path}: is not a file of this bundle: remove it")


def fingerprint(folder: Path) -> str:
    """SHA-256 of the client's manifest: what clients pin."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _verify_signature(folder: Path, signer: str) -> None:
    try:
        signature = bytes.fromhex((folder / SIGNATURE).read_text(encoding="ascii").strip())
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer)).verify(signature, (folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise BadBundle(f"{folder}: no {SIGNATURE}; copy the bundle again") from error
    except (InvalidSignature, OSError, ValueError) as error:
        raise TamperedBundle(f"{folder / MANIFEST}: its signature is wrong: the bundle was changed after it was made") from error


def _check_common(record: dict[str, Any], path: Path) -> None:
    require(record["scheme"] == SCHEME, path, "scheme")
    if record["specification"] != SPECIFICATION:
        raise BadBundle(f"{path}: made for specification {record['specification']!r} of the encryption, this cloven has {SPECIFICATION}")
    require(isinstance(record["bundle"], str) and _HEX16.fullmatch(record["bundle"]) is not None, path, "bundle")
    require(type(record["bits"]) is int and FEWEST_BITS <= record["bits"] <= MOST_BITS, path, "bits")
    require(record["hint"] in ("lwe", "statistical"), path, "hint")
    require(isinstance(record["groups"], list) and len(record["groups"]) > 0, path, "groups")


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST_SIDE


def _parse_group(group: object, path: Path) -> ClientGroup:
    require(isinstance(group, dict) and set(group) == {"columns", "l2", "modules"}, path, "a group")
    assert isinstance(group, dict)
    require(_is_side(group["columns"]) and _is_side(group["l2"]), path, "a group's numbers")
    require(isinstance(group["modules"], list) and len(group["modules"]) > 0, path, "a group's modules")
    for module in group["modules"]:
        require(isinstance(module, dict) and set(module) == {"name", "outputs", "rank"}, path, "a module")
        require(isinstance(module["name"], str) and _MODULE.fullmatch(module["name"]) is not None, path, "a module's name")
        require(_is_side(module["outputs"]) and _is_side(module["rank"]), path, "a module's numbers")
    return ClientGroup(group["columns"], group["l2"], tuple(ClientModule(**module) for module in group["modules"]))
