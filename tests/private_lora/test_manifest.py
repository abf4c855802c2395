from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from cloven.bundle.manifest import MANIFEST
from cloven.errors import BadBundle, BadInput, ClovenError, ForeignBundle, TamperedBundle
from cloven.masks.lwe_parameters import lwe_parameters
from cloven.private_lora.manifest import (
    SERVER_FILE,
    SIGNATURE,
    ClientGroup,
    ClientManifest,
    ClientModule,
    ServerGroup,
    ServerManifest,
    client_bundle_id,
    fingerprint,
    read_client,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
GROUPS = (
    ClientGroup(48, 300, (ClientModule("a.q", 48, 4), ClientModule("a.k", 24, 3))),
    ClientGroup(80, 310, (ClientModule("a.o", 48, 4),)),
)
WEIGHTS = {"model.safetensors": "a" * 64}
_DRAFT = ClientManifest("", "5" * 32, 16, "lwe", "b" * 64, "someone/base", GROUPS, SIGNER, WEIGHTS)
CLIENT = replace(_DRAFT, bundle=client_bundle_id(_DRAFT), files={**WEIGHTS, "config.json": "c" * 64})
SERVER = ServerManifest(
    CLIENT.bundle,
    16,
    "lwe",
    "d" * 64,
    "ledger.sqlite",
    (ServerGroup("a.q+a.k", 14, 1328, 6.5), ServerGroup("a.o", 8, 1360, 7.0)),
    {SERVER_FILE: "e" * 64},
)


def signed(folder: Path, data: bytes, key: Ed25519PrivateKey = KEY) -> Path:
    """A client's folder with this manifest, rightly signed."""
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_text(key.sign(data).hex(), encoding="ascii")
    return folder


def record_of(manifest: ClientManifest | ServerManifest, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    if isinstance(manifest, ClientManifest):
        manifest.write(folder, KEY)
    else:
        manifest.write(folder)
    record: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return record


def changed(record: dict[str, Any], change: dict[str, Any]) -> bytes:
    """With fields changed; `...` removes one."""
    return json.dumps({key: value for key, value in {**record, **change}.items() if value is not ...}).encode()


def test_round_trips(tmp_path: Path) -> None:
    record_of(CLIENT, tmp_path / "c")
    assert ClientManifest.read(tmp_path / "c") == CLIENT == read_client(tmp_path / "c")
    record_of(SERVER, tmp_path / "s")
    assert ServerManifest.read(tmp_path / "s") == SERVER
    assert CLIENT.parameters == SERVER.parameters == lwe_parameters("lwe")


def test_groups_name_themselves() -> None:
    assert GROUPS[0].name == "a.q+a.k" and GROUPS[0].rows == 14 and GROUPS[1].rows == 8


def test_the_servers_manifest_is_closed_to_others(tmp_path: Path) -> None:
    record_of(SERVER, tmp_path / "s")
    assert (tmp_path / "s" / MANIFEST).stat().st_mode & 0o777 == 0o600


def test_where_the_ledger_is(tmp_path: Path) -> None:
    assert SERVER.ledger_path(tmp_path) == tmp_path.resolve() / "ledger.sqlite"
    assert replace(SERVER, ledger="/var/lib/l.sqlite").ledger_path(tmp_path) == Path("/var/lib/l.sqlite")


# --- id and fingerprint


def slow_id(manifest: ClientManifest) -> str:
    record = json.loads(json.dumps(manifest, default=vars))
    weights = {name: digest for name, digest in record.pop("files").items() if name.endswith(".safetensors")}
    del record["bundle"], record["base_name"]
    return hashlib.sha256(json.dumps([1, 1, record, weights], sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def test_the_id_is_a_hash_of_what_the_client_gets() -> None:
    assert client_bundle_id(CLIENT) == CLIENT.bundle == slow_id(CLIENT)


def test_a_vector_of_the_id() -> None:
    assert CLIENT.bundle == "15e8af625a760cb9373eaf61a5abc227"


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": "6" * 32},
        {"bits": 12},
        {"hint": "statistical"},
        {"base": "0" * 64},
        {"groups": GROUPS[:1]},
        {"groups": GROUPS[::-1]},
        {"groups": (replace(GROUPS[0], l2=301), GROUPS[1])},
        {"signer": "1" * 64},
        {"files": {"model.safetensors": "f" * 64}},
    ],
    ids=str,
)
def test_the_id_names_everything_that_counts(change: dict[str, Any]) -> None:
    assert client_bundle_id(replace(CLIENT, **change)) != CLIENT.bundle


def test_the_id_ignores_where_the_base_came_from() -> None:
    assert client_bundle_id(replace(CLIENT, base_name="x", files=WEIGHTS)) == CLIENT.bundle


def test_the_fingerprint_is_the_files_hash(tmp_path: Path) -> None:
    tmp_path.joinpath("c").mkdir()
    mark = CLIENT.write(tmp_path / "c", KEY)
    assert mark == fingerprint(tmp_path / "c") == hashlib.sha256((tmp_path / "c" / MANIFEST).read_bytes()).hexdigest()


def test_the_right_pin(tmp_path: Path) -> None:
    tmp_path.joinpath("c").mkdir()
    mark = CLIENT.write(tmp_path / "c", KEY)
    assert read_client(tmp_path / "c", mark) == read_client(tmp_path / "c", mark.upper()) == CLIENT


def test_another_pin(tmp_path: Path) -> None:
    record_of(CLIENT, tmp_path / "c")
    with pytest.raises(ForeignBundle, match=f"pinned is {'0' * 64}: do not use it"):
        read_client(tmp_path / "c", "0" * 64)


@pytest.mark.parametrize("pin", ["", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n", " " * 64])
def test_no_pin(pin: str, tmp_path: Path) -> None:
    record_of(CLIENT, tmp_path / "c")
    with pytest.raises(BadInput, match="the pin is no fingerprint"):
        read_client(tmp_path / "c", pin)


def test_the_pin_tells_bundles_of_another_signer_apart(tmp_path: Path) -> None:
    """Anybody can sign a bundle with a key of their own: the signature alone says nothing, the pin does."""
    tmp_path.joinpath("c").mkdir()
    mark = CLIENT.write(tmp_path / "c", KEY)
    own = Ed25519PrivateKey.generate()
    draft = replace(CLIENT, bundle="", signer=own.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex())
    tmp_path.joinpath("d").mkdir()
    replace(draft, bundle=client_bundle_id(draft)).write(tmp_path / "d", own)
    assert read_client(tmp_path / "d") != CLIENT
    with pytest.raises(ForeignBundle):
        read_client(tmp_path / "d", mark)


# --- the signature


def test_every_byte_is_signed(tmp_path: Path) -> None:
    data = bytearray(json.dumps(record_of(CLIENT, tmp_path / "c")).encode())
    signed(tmp_path / "c", bytes(data))
    ClientManifest.read(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).write_bytes(data + b"\n")
    with pytest.raises(TamperedBundle, match="its signature is wrong"):
        ClientManifest.read(tmp_path / "c")


def test_a_signature_of_another_key(tmp_path: Path) -> None:
    data = changed(record_of(CLIENT, tmp_path / "c"), {})
    with pytest.raises(TamperedBundle):
        ClientManifest.read(signed(tmp_path / "c", data, Ed25519PrivateKey.generate()))


@pytest.mark.parametrize("content", [b"", b"xx", b"00" * 63, b"00" * 64, b"00" * 65, b"\xff\xfe", b"0x" + b"0" * 126, b"0" * 10_000])
def test_malformed_signatures(content: bytes, tmp_path: Path) -> None:
    record_of(CLIENT, tmp_path / "c")
    (tmp_path / "c" / SIGNATURE).write_bytes(content)
    with pytest.raises(TamperedBundle):
        ClientManifest.read(tmp_path / "c")


def test_no_signature(tmp_path: Path) -> None:
    record_of(CLIENT, tmp_path / "c")
    (tmp_path / "c" / SIGNATURE).unlink()
    with pytest.raises(BadBundle, match=f"no {SIGNATURE}"):
        ClientManifest.read(tmp_path / "c")


# --- schemas

COMMON: list[dict[str, Any]] = [
    {"scheme": "slip"},
    {"specification": 2},
    {"bundle": "5" * 31},
    {"bundle": "G" * 32},
    {"bits": 7},
    {"bits": 17},
    {"bits": 16.0},
    {"bits": True},
    {"hint": "none"},
    {"hint": ["lwe"]},
    {"groups": []},
    {"groups": {}},
    {"groups": [3]},
    {"files": []},
    {"files": {"../x": "a" * 64}},
    {"files": {"x": "a" * 63}},
    {"format": "cloven-exposed"},
    {"version": 2},
    {"extra": 1},
    {"files": ...},
    {"bits": ...},
]
MODULE = {"name": "a.q", "outputs": 48, "rank": 4}


def client_group(**change: Any) -> dict[str, Any]:
    group = {"columns": 48, "l2": 300, "modules": [MODULE], **change}
    return {"groups": [{key: value for key, value in group.items() if value is not ...}]}


@pytest.mark.parametrize(
    "change",
    [
        *COMMON,
        {"nonce": "x"},
        {"base": None},
        {"signer": "A" * 64},
        {"base_name": 3},
        {"base_name": "x" * 257},
        client_group(columns=0),
        client_group(columns=2**24),
        client_group(columns=1.0),
        client_group(l2=-1),
        client_group(l2=...),
        client_group(x=1),
        client_group(modules=[]),
        client_group(modules={}),
        client_group(modules=[{**MODULE, "rank": 0}]),
        client_group(modules=[{**MODULE, "rank": True}]),
        client_group(modules=[{**MODULE, "name": "a b"}]),
        client_group(modules=[{**MODULE, "name": ""}]),
        client_group(modules=[{**MODULE, "name": "a" * 257}]),
        client_group(modules=[{**MODULE, "name": "../x"}]),
        client_group(modules=[{**MODULE, "outputs": "48"}]),
        client_group(modules=[{"name": "a"}]),
        client_group(),  # well-formed, and not what the id says
    ],
    ids=str,
)
def test_clients_that_are_refused_although_signed(change: dict[str, Any], tmp_path: Path) -> None:
    data = changed(record_of(CLIENT, tmp_path / "c"), change)
    with pytest.raises((BadBundle, TamperedBundle)):
        ClientManifest.read(signed(tmp_path / "c", data))


@pytest.mark.parametrize(
    "change",
    [
        *COMMON,
        {"adapter": "x"},
        {"ledger": ""},
        {"ledger": 3},
        {"ledger": "x" * 4096},
        {"files": {}},
        {"groups": [{"name": "a", "rows": 0, "columns": 3, "entropy": 7.0}]},
        {"groups": [{"name": "a", "rows": 2, "columns": 2**24, "entropy": 7.0}]},
        {"groups": [{"name": "", "rows": 2, "columns": 3, "entropy": 7.0}]},
        {"groups": [{"name": 5, "rows": 2, "columns": 3, "entropy": 7.0}]},
        {"groups": [{"name": "a", "rows": 2, "columns": 3, "entropy": 7.0, "x": 1}]},
        {"groups": [{"name": "a", "rows": 2, "columns": 3, "entropy": 7.0}] * 2},
    ],
    ids=lambda change: str(change)[:60],
)
def test_servers_that_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    data = changed(record_of(SERVER, tmp_path / "s"), change)
    (tmp_path / "s" / MANIFEST).write_bytes(data)
    with pytest.raises(BadBundle):
        ServerManifest.read(tmp_path / "s")


@pytest.mark.parametrize(
    "groups", [(replace(GROUPS[0], modules=GROUPS[0].modules[:1] * 2),), (GROUPS[0], GROUPS[0])], ids=["group", "bundle"]
)
def test_a_module_is_adapted_once(groups: tuple[ClientGroup, ...], tmp_path: Path) -> None:
    draft = replace(CLIENT, groups=groups)
    record_of(replace(draft, bundle=client_bundle_id(draft)), tmp_path / "c")
    with pytest.raises(BadBundle):
        ClientManifest.read(tmp_path / "c")


def test_another_specification_says_so(tmp_path: Path) -> None:
    data = changed(record_of(CLIENT, tmp_path / "c"), {"specification": 2})
    with pytest.raises(BadBundle, match="made for specification 2 of the encryption"):
        ClientManifest.read(signed(tmp_path / "c", data))


def test_one_half_is_not_the_other(tmp_path: Path) -> None:
    record_of(CLIENT, tmp_path / "c")
    record_of(SERVER, tmp_path / "s")
    with pytest.raises(BadBundle):
        ClientManifest.read(tmp_path / "s")
    with pytest.raises(BadBundle):
        ServerManifest.read(tmp_path / "c")
    with pytest.raises(BadBundle, match="no bundle half"):
        ServerManifest.read(tmp_path)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=6) | st.sampled_from(["a" * 64, "5" * 32, "lwe"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["columns", "l2", "modules", "name", "outputs", "rank", "rows", "entropy"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=120)
@given(st.data())
def test_any_change_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Signed, so that the schema sees it."""
    folder = tmp_path_factory.getbasetemp() / "changed"
    for manifest in (CLIENT, SERVER):
        record = record_of(manifest, folder)
        change = data.draw(st.dictionaries(st.sampled_from(sorted(record)), JSON, min_size=1, max_size=2))
        signed(folder, changed(record, change))
        try:
            ClientManifest.read(folder) if manifest is CLIENT else ServerManifest.read(folder)
        except ClovenError:
            continue
        finally:
            shutil.rmtree(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 5000])
def test_no_manifests(content: bytes, tmp_path: Path) -> None:
    signed(tmp_path / "c", content)
    for kind in (ClientManifest, ServerManifest):
        with pytest.raises(BadBundle):
            kind.read(tmp_path / "c")
