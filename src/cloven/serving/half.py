"""Which half of which scheme a directory is, and what it connects to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloven.bundle.manifest import manifest_format
from cloven.bundle.trusted_manifest import TrustedManifest
from cloven.bundle.verification import verify_files
from cloven.errors import BadInput
from cloven.kv_shield.manifest import EXPOSED, TRUSTED, KvManifest
from cloven.kv_shield.messages import ENCLAVE
from cloven.private_lora.manifest import CLIENT, SERVER, ClientManifest
from cloven.private_lora.messages import ADAPTER
from cloven.wire.messages import WORKER
from cloven.wire.schema import Schema


@dataclass(frozen=True)
class Half:
    """The half that runs the model.

    Args:
        folder: OUT/trusted, OUT/exposed or OUT/client.
        scheme: "slip", "kv-shield" or "private-lora".
        bundle: its id, 32 hexadecimal digits.
        address: of the peer; of several, separated by spaces (SLIP).
        peer, schema: the command that starts the peer, and its messages.
        batches: whether sequences of several requests may share a cache: not where each has keys of its own.
    """

    folder: Path
    scheme: str
    bundle: str
    address: str
    peer: str
    schema: Schema
    batches: bool


def open_half(folder: Path, worker: str | None, enclave: str | None, server: str | None) -> Half:
    """Hash what transformers would stumble over (shards are hashed when they are loaded), and find the half's peer.

    Args:
        worker, enclave, server: the addresses that were given; the one of the half's scheme is used.

    Raises:
        BadInput: it is the other half, or its peer's address was not given.
        BadBundle, TamperedBundle: the directory.
    """
    kind = manifest_format(folder)
    if kind == SERVER:
        raise BadInput(f"{folder}: the adapter server's half; generate with OUT/client, and serve this one with `cloven adapter-server`")
    if kind == TRUSTED:
        raise BadInput(f"{folder}: the enclave's half; generate with OUT/exposed, and serve this one with `cloven enclave`")
    found: tuple[ClientManifest | KvManifest | TrustedManifest, str, str | None, str, Schema]
    if kind == CLIENT:
        found = ClientManifest.read(folder), "private-lora", server, "adapter-server", ADAPTER
    elif kind == EXPOSED:
        found = KvManifest.read(folder, EXPOSED), "kv-shield", enclave, "enclave", ENCLAVE
    else:
        found = TrustedManifest.read(folder), "slip", worker, "worker", WORKER
    manifest, scheme, address, peer, schema = found
    option = f"--{peer.removeprefix('adapter-')}"
    if address is None:
        raise BadInput(f"{folder}: give {option} ADDRESS (or CLOVEN_{option[2:].upper()})")
    batches = not isinstance(manifest, KvManifest) or manifest.config.mode != "session"
    verify_files(folder, {name: digest for name, digest in manifest.files.items() if not name.endswith(".safetensors")})
    return Half(folder, scheme, manifest.bundle, address, peer, schema, batches)
