from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zmq

from cloven.errors import BadInput, ClovenError, PeerRefused
from cloven.wire import keys
from cloven.wire.keys import generate_client, generate_keys, trusted_keys, worker_keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generate_keys(tmp_path / "keys")
    return tmp_path / "keys"


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a key file; a value of `...` removes one."""
    record = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}), encoding="utf-8")


def test_generated_keys_belong_together(folder: Path) -> None:
    trusted, worker = trusted_keys(folder), worker_keys(folder)
    assert trusted.worker == worker.own.public != trusted.own.public
    assert zmq.utils.z85.decode(trusted.own.public) in worker.allowed()
    assert len(worker.allowed()) == 1
    assert zmq.curve_public(trusted.own.secret) == trusted.own.public


def test_each_partys_own_folder_is_enough(folder: Path) -> None:
    assert trusted_keys(folder / "trusted") == trusted_keys(folder)
    assert worker_keys(folder / "worker") == worker_keys(folder)


def test_no_folder_holds_the_others_secret(folder: Path) -> None:
    trusted, worker = trusted_keys(folder), worker_keys(folder)
    for part, foreign in (("trusted", worker.own.secret), ("worker", trusted.own.secret)):
        assert all(foreign.decode() not in path.read_text(encoding="utf-8") for path in (folder / part).rglob("*.json"))


def test_modes(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        assert path.stat().st_mode & 0o777 == 0o600
    for path in (folder / "trusted", folder / "worker", folder / "worker" / "allowed"):
        assert path.stat().st_mode & 0o777 == 0o700


def test_never_overwrites(folder: Path) -> None:
    before = (folder / "trusted" / "key.json").read_bytes()
    with pytest.raises(BadInput, match="holds keys already"):
        generate_keys(folder)
    assert (folder / "trusted" / "key.json").read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput):
        generate_keys(tmp_path / "file")


def test_repr_hides_the_secret(folder: Path) -> None:
    for record in (trusted_keys(folder), worker_keys(folder)):
        assert record.own.secret.decode() not in repr(record)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_secret_open_to_others_is_refused(folder: Path, mode: int) -> None:
    for part, read in (("trusted", trusted_keys), ("worker", worker_keys)):
        (folder / part / "key.json").chmod(mode)
        with pytest.raises(PeerRefused, match="chmod 600"):
            read(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": ...},
        {"format": "ssh"},
        {"extra": "x"},
        {"public": ...},
        {"public": 3},
        {"public": "a" * 39},
        {"public": "a" * 41},
        {"public": " " * 40},
        {"public": "é" * 40},
        {"public": "#" * 40},  # every character is Z85's, but the number is larger than 32 bits
        {"secret": "0" * 40},  # of another pair
        {"secret": ...},
        {"secret": None},
    ],
    ids=str,
)
def test_malformed_key_files(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder / "trusted" / "key.json", **changes)
    with pytest.raises(BadInput) as caught:
        trusted_keys(folder)
    assert "key.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 4000, b"x" * 5000])
def test_no_key_files(folder: Path, content: bytes) -> None:
    (folder / "trusted" / "worker.json").write_bytes(content)
    with pytest.raises(BadInput):
        trusted_keys(folder)


def test_messages_never_hold_the_secret(folder: Path) -> None:
    path = folder / "trusted" / "key.json"
    secret = json.loads(path.read_text(encoding="utf-8"))["secret"]
    rewrite(path, public="0" * 40)
    with pytest.raises(BadInput) as caught:
        trusted_keys(folder)
    assert secret not in str(caught.value) + repr(caught.value.__cause__)


def test_missing_files(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadInput, match="keygen"):
        trusted_keys(tmp_path / "nothing")
    (folder / "worker" / "allowed" / "trusted.json").unlink()
    with pytest.raises(BadInput, match="nobody could connect"):
        worker_keys(folder)


def test_a_secret_among_the_allowed_is_an_error(folder: Path) -> None:
    # somebody copied a key pair where a public key belongs: refuse loudly, do not use half of it
    (folder / "worker" / "allowed" / "pair.json").write_bytes((folder / "trusted" / "key.json").read_bytes())
    with pytest.raises(BadInput, match="public key only"):
        worker_keys(folder)


@pytest.mark.parametrize("content", [b"{", b"[" * 4000, json.dumps({"format": "cloven-key", "version": 1, "public": "#" * 40}).encode()])
def test_an_unreadable_allowed_file_is_an_error_of_ours(folder: Path, content: bytes) -> None:
    # Admission survives a ClovenError only: anything else would end its thread, and nobody could connect any more
    allowed = worker_keys(folder)
    (folder / "worker" / "allowed" / "broken.json").write_bytes(content)
    with pytest.raises(ClovenError):
        allowed.allowed()


def test_allowed_is_read_anew(folder: Path) -> None:
    loaded = worker_keys(folder)
    file = folder / "worker" / "allowed" / "trusted.json"
    content = file.read_bytes()
    file.unlink()
    assert loaded.allowed() == frozenset()
    file.write_bytes(content)
    assert len(loaded.allowed()) == 1


def test_too_many_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_ALLOWED", 0)
    with pytest.raises(BadInput, match="more than 0 keys"):
        worker_keys(folder)


# --- more clients


def test_another_client_is_admitted(folder: Path, tmp_path: Path) -> None:
    admitted = generate_client(tmp_path / "second", folder)
    first, second, server = trusted_keys(folder), trusted_keys(tmp_path / "second"), worker_keys(folder)
    assert second.worker == first.worker == server.own.public and second.own.public != first.own.public
    assert server.allowed() == {zmq.utils.z85.decode(keys.own.public) for keys in (first, second)}
    assert admitted.parent == folder / "worker" / "allowed" and admitted.stem == zmq.utils.z85.decode(second.own.public).hex()
    assert zmq.curve_public(second.own.secret) == second.own.public


def test_the_servers_own_folder_admits_as_well(folder: Path, tmp_path: Path) -> None:
    generate_client(tmp_path / "second", folder / "worker")
    generate_client(tmp_path / "third", folder)
    assert len(worker_keys(folder).allowed()) == 3


def test_removing_the_file_revokes_the_client(folder: Path, tmp_path: Path) -> None:
    generate_client(tmp_path / "second", folder).unlink()
    assert worker_keys(folder).allowed() == {zmq.utils.z85.decode(trusted_keys(folder).own.public)}


def test_modes_of_another_clients_keys(folder: Path, tmp_path: Path) -> None:
    admitted = generate_client(tmp_path / "second", folder)
    for path in (*(tmp_path / "second").rglob("*.json"), admitted):
        assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "second" / "trusted").stat().st_mode & 0o777 == 0o700


def test_no_secret_leaves_its_folder(folder: Path, tmp_path: Path) -> None:
    generate_client(tmp_path / "second", folder)
    second, server = trusted_keys(tmp_path / "second").own.secret.decode(), worker_keys(folder).own.secret.decode()
    assert all(second not in path.read_text(encoding="utf-8") for path in folder.rglob("*.json"))
    assert all(server not in path.read_text(encoding="utf-8") for path in (tmp_path / "second").rglob("*.json"))


def test_another_clients_keys_are_never_overwritten(folder: Path, tmp_path: Path) -> None:
    generate_client(tmp_path / "second", folder)
    before = (tmp_path / "second" / "trusted" / "key.json").read_bytes()
    with pytest.raises(BadInput, match="holds keys already"):
        generate_client(tmp_path / "second", folder)
    assert (tmp_path / "second" / "trusted" / "key.json").read_bytes() == before and len(worker_keys(folder).allowed()) == 2
    with pytest.raises(BadInput, match="holds keys already"):
        generate_client(folder, folder)


def test_a_client_of_no_server(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="keygen"):
        generate_client(tmp_path / "second", tmp_path / "nowhere")
    with pytest.raises(ClovenError):
        generate_client(tmp_path / "second", folder / "trusted")  # the trusted side's keys admit nobody
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write keys"):
        generate_client(tmp_path / "file", folder)
    assert not (tmp_path / "second").exists() and len(worker_keys(folder).allowed()) == 1
