"""Who gets in: the ZAP handler by itself, and CURVE and ipc connections to a real worker."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from cloven.errors import BadInput, PeerRefused, RunError
from cloven.wire import admission
from cloven.wire.admission import DOMAIN, Admission
from cloven.wire.channel import Channel
from cloven.wire.keys import TrustedKeys, generate_keys, trusted_keys, worker_keys
from tests.helpers import Context, free_port, python_product, random_codes, random_residues, serving, write_exposed

W = random_codes(4, 16)
KEY = bytes(range(32))
UID = os.getuid()


def ask(
    handler: Admission,
    *,
    version: bytes = b"1.0",
    domain: bytes = DOMAIN,
    address: bytes = b"127.0.0.1",
    mechanism: bytes = b"CURVE",
    credentials: tuple[bytes, ...] = (KEY,),
) -> bytes:
    """The status of the answer to a ZAP request (RFC 27)."""
    answer = handler._answer([version, b"42", domain, address, b"", mechanism, *credentials])
    assert len(answer) == 6
    assert answer[:2] == [version, b"42"]
    return answer[2]


@pytest.fixture
def curve(context: Context) -> Iterator[Admission]:
    handler = Admission(context, lambda: frozenset([KEY]))
    yield handler
    handler._zap.close()


@pytest.fixture
def plain(context: Context) -> Iterator[Admission]:
    handler = Admission(context, None)
    yield handler
    handler._zap.close()


def test_only_listed_keys(curve: Admission) -> None:
    assert ask(curve) == b"200"
    assert ask(curve, credentials=(bytes(32),)) == b"400"
    assert ask(curve, credentials=(KEY[:31],)) == b"400"
    assert ask(curve, credentials=()) == b"400"
    assert ask(curve, credentials=(KEY, KEY)) == b"400"


def test_only_the_mechanism_in_use(curve: Admission) -> None:
    for mechanism in (b"NULL", b"PLAIN", b"GSSAPI", b""):
        assert ask(curve, mechanism=mechanism) == b"400"


def test_without_keys_only_null(plain: Admission) -> None:
    assert ask(plain, mechanism=b"NULL", credentials=()) == b"200"
    for mechanism in (b"CURVE", b"PLAIN", b""):
        assert ask(plain, mechanism=mechanism) == b"400"


def test_version_and_domain(curve: Admission) -> None:
    assert ask(curve, version=b"2.0") == b"400"
    assert ask(curve, domain=b"") == b"400"
    assert ask(curve, domain=b"global") == b"400"


@pytest.mark.parametrize("frames", [[], [b"1.0"], [b"1.0", b"1", DOMAIN, b"", b""]])
def test_malformed_requests(curve: Admission, frames: list[bytes]) -> None:
    assert curve._answer(frames)[2] == b"500"


@pytest.mark.parametrize("host", ["", "localhost"])
def test_ipc_peers_of_another_user_are_refused(curve: Admission, host: str) -> None:
    # libzmq writes "localhost:uid:gid:pid" for a Unix socket's peer (getnameinfo's name first); older ones ":uid:gid:pid"
    other = f"{host}:{12345 if UID != 12345 else 12346}:0:1".encode()
    mine = f"{host}:{UID}:0:1".encode()
    assert ask(curve, address=other) == b"400"
    assert ask(curve, address=mine) == b"200"
    curve._allowed = None  # as without keys
    assert ask(curve, address=other, mechanism=b"NULL", credentials=()) == b"400"
    assert ask(curve, address=mine, mechanism=b"NULL", credentials=()) == b"200"


def test_unreadable_keys_refuse_everybody(curve: Admission) -> None:
    def fail() -> frozenset[bytes]:
        raise BadInput("allowed/x.json: not a readable key file")

    curve._allowed = fail
    assert ask(curve) == b"400"


def test_connection_cap(curve: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(admission, "MAX_CONNECTIONS", 3)
    curve._open = dict.fromkeys(range(100, 400), now[0])  # opened by strangers
    curve._open |= dict.fromkeys((5, 6, 7), now[0])
    assert [ask(curve) for _ in range(4)] == [b"200", b"200", b"200", b"400"]
    now[0] += admission._UNDECIDED_SECONDS + 0.1
    curve._open = dict.fromkeys((5, 6, 7), 1000.0)  # libzmq has closed the others
    assert ask(curve) == b"400"
    del curve._open[6]
    curve._open[8] = now[0]  # the one that asks
    assert ask(curve) == b"200"
    curve._open[9] = now[0]
    assert ask(curve) == b"400"


def test_connections_that_have_ended_do_not_count(curve: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_CONNECTIONS", 3)
    assert [ask(curve) for _ in range(20)] == [b"200"] * 20


# ---- live ----


@dataclasses.dataclass
class Setup:
    """A bundle, keys, and a free tcp address."""

    exposed: Path
    bundle: bytes
    keys: Path
    tcp: str

    def channel(self, keys: TrustedKeys | None = None, timeout: float = 4, **options: bool) -> Channel:
        return Channel(self.tcp, self.bundle, keys=keys, timeout=timeout, **options)

    def hello(self, keys: TrustedKeys | None = None, timeout: float = 4, **options: bool) -> int:
        channel = self.channel(keys, timeout, **options)
        try:
            return channel.hello()
        finally:
            channel.close()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    manifest = write_exposed(tmp_path / "exposed", [W])
    generate_keys(tmp_path / "keys")
    return Setup(tmp_path / "exposed", bytes.fromhex(manifest.bundle), tmp_path / "keys", f"tcp://127.0.0.1:{free_port()}")


def test_curve(setup: Setup) -> None:
    c = random_residues(3, 16)
    with serving(setup.exposed, setup.tcp, keys=worker_keys(setup.keys)):
        channel = setup.channel(trusted_keys(setup.keys))
        try:
            assert channel.hello() == 1
            assert torch.equal(channel.multiply("layer", 0, c, 4, lambda: None), python_product(c, W))
        finally:
            channel.close()


def test_the_largest_payload_fits_through_curve(tmp_path: Path, setup: Setup) -> None:
    # 4096 columns: `rows_per_exchange` cuts at exactly MAX_PAYLOAD_BYTES, and CURVE adds its own bytes to every frame
    from cloven.wire.limits import MAX_PAYLOAD_BYTES, rows_per_exchange

    wide = random_codes(2, 4096)
    manifest = write_exposed(tmp_path / "wide", [wide])
    rows = rows_per_exchange(4096, 2)
    assert MAX_PAYLOAD_BYTES - 4 * 4096 < rows * 4 * 4096 <= MAX_PAYLOAD_BYTES
    c = torch.zeros(rows, 4096, dtype=torch.int32)
    c[:, 0] = 3
    with serving(tmp_path / "wide", setup.tcp, keys=worker_keys(setup.keys)):
        channel = Channel(setup.tcp, bytes.fromhex(manifest.bundle), keys=trusted_keys(setup.keys), timeout=8)
        try:
            z = channel.multiply("layer", 0, c, 2, lambda: None)
        finally:
            channel.close()
    assert torch.equal(z, (3 * wide[:, 0].to(torch.int32)).expand(rows, 2))
    assert channel.telemetry.total().resent == 0


def test_an_unlisted_key_is_refused_and_the_worker_goes_on(tmp_path: Path, setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    generate_keys(tmp_path / "other")
    stranger = TrustedKeys(trusted_keys(tmp_path / "other").own, trusted_keys(setup.keys).worker)
    with serving(setup.exposed, setup.tcp, keys=worker_keys(setup.keys)) as worker, caplog.at_level(logging.WARNING, "cloven"):
        with pytest.raises(PeerRefused, match="refuses this key"):
            setup.hello(stranger)
        assert "an unlisted key" in caplog.text
        assert worker.answered == worker.refused == 0  # not one of its messages came through
        assert setup.hello(trusted_keys(setup.keys)) == 1


def logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    deadline = time.monotonic() + 5
    while text not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    return text in caplog.text


def test_a_wrong_pinned_key(tmp_path: Path, setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    generate_keys(tmp_path / "other")
    mistaken = TrustedKeys(trusted_keys(setup.keys).own, trusted_keys(tmp_path / "other").worker)
    with serving(setup.exposed, setup.tcp, keys=worker_keys(setup.keys)) as worker:
        with pytest.raises(PeerRefused, match="not the pinned one"):
            setup.hello(mistaken)
        assert logged(caplog, "its handshake failed")
        assert worker.answered == worker.refused == 0


def test_a_plain_client_at_a_curve_port(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    with serving(setup.exposed, setup.tcp, keys=worker_keys(setup.keys)) as worker:
        with pytest.raises(PeerRefused, match="only one side uses keys"):
            setup.hello(insecure_plain_tcp=True, timeout=3)
        assert logged(caplog, "its handshake failed")
        assert worker.answered == worker.refused == 0


def test_a_curve_client_at_a_plain_port(setup: Setup) -> None:
    with serving(setup.exposed, setup.tcp, insecure_plain_tcp=True) as worker:
        with pytest.raises(PeerRefused, match="only one side uses keys"):
            setup.hello(trusted_keys(setup.keys), timeout=3)
        assert worker.answered == worker.refused == 0


def test_plain_tcp_works_when_both_sides_insist(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cloven"), serving(setup.exposed, setup.tcp, insecure_plain_tcp=True):
        assert setup.hello(insecure_plain_tcp=True) == 1
    assert caplog.text.count("INSECURE") == 2  # a banner on either side


def test_without_the_handler_nobody_gets_in(setup: Setup) -> None:
    # a CURVE server without a ZAP handler would accept every key: ZAP_ENFORCE_DOMAIN is what prevents it
    with serving(setup.exposed, setup.tcp, keys=worker_keys(setup.keys)) as worker:
        assert setup.hello(trusted_keys(setup.keys)) == 1
        assert worker._admission is not None
        worker._admission.stop()
        with pytest.raises((PeerRefused, RunError)):
            setup.hello(trusted_keys(setup.keys), timeout=2)
        assert worker.answered == 1


def test_without_the_handler_nobody_gets_in_by_ipc(setup: Setup, socket_folder: Path) -> None:
    setup.tcp = f"ipc://{socket_folder}/w"
    with serving(setup.exposed, setup.tcp) as worker:
        assert setup.hello() == 1
        assert worker._admission is not None
        worker._admission.stop()
        answered = worker.answered
        with pytest.raises((PeerRefused, RunError)):
            setup.hello(timeout=1)
        assert worker.answered == answered


def test_revocation(setup: Setup) -> None:
    with serving(setup.exposed, setup.tcp, keys=worker_keys(setup.keys)):
        assert setup.hello(trusted_keys(setup.keys)) == 1
        (setup.keys / "worker" / "allowed" / "trusted.json").unlink()
        with pytest.raises(PeerRefused, match="refuses this key"):
            setup.hello(trusted_keys(setup.keys))


@pytest.mark.parametrize("content", ["{", '{"format": "cloven-key", "version": 1, "public": "' + "#" * 40 + '"}', "[" * 4000])
def test_a_broken_allowed_file_refuses_until_it_is_gone(setup: Setup, content: str) -> None:
    with serving(setup.exposed, setup.tcp, keys=worker_keys(setup.keys)) as worker:
        broken = setup.keys / "worker" / "allowed" / "broken.json"
        broken.write_text(content, encoding="utf-8")
        with pytest.raises((PeerRefused, RunError)):
            setup.hello(trusted_keys(setup.keys), timeout=2)
        broken.unlink()
        assert worker._admission is not None and worker._admission.is_alive()
        assert setup.hello(trusted_keys(setup.keys)) == 1


def test_connections_are_counted(setup: Setup, socket_folder: Path) -> None:
    setup.tcp = f"ipc://{socket_folder}/w"
    with serving(setup.exposed, setup.tcp) as worker:
        assert worker._admission is not None
        channels = [setup.channel() for _ in range(3)]
        for channel in channels:
            channel.hello()
        assert len(worker._admission._open) == 3
        for channel in channels:
            channel.close()
        deadline = time.monotonic() + 3
        while worker._admission._open and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not worker._admission._open


def test_sockets_that_are_only_opened_keep_nobody_out(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_CONNECTIONS", 3)
    keys, host = trusted_keys(setup.keys), ("127.0.0.1", int(setup.tcp.rsplit(":", 1)[1]))
    with serving(setup.exposed, setup.tcp, keys=worker_keys(setup.keys)) as worker, contextlib.ExitStack() as stack:
        assert worker._admission is not None
        for _ in range(8):
            stack.enter_context(socket.create_connection(host))
        while len(worker._admission._open) < 8:
            time.sleep(0.01)
        channels = [setup.channel(keys) for _ in range(3)]
        for channel in channels:
            stack.callback(channel.close)
            assert channel.hello() == 1
        with pytest.raises(PeerRefused):
            setup.hello(keys)  # the cap is of admitted ones


def test_libzmq_tells_the_uid_of_an_ipc_peer(setup: Setup, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    answer = Admission._answer

    def spy(self: Admission, request: list[bytes]) -> list[bytes]:
        seen.append(request[3])
        return answer(self, request)

    monkeypatch.setattr(Admission, "_answer", spy)
    setup.tcp = f"ipc://{socket_folder}/w"
    with serving(setup.exposed, setup.tcp):
        assert setup.hello() == 1
    assert [address.decode().split(":")[-3:-1] for address in seen] == [[str(UID), str(os.getgid())]]


_OTHER_USER = """
import os, sys, zmq
address = sys.argv[1]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
socket = zmq.Context().socket(zmq.DEALER)
socket.linger = 0
socket.connect(address)
socket.send(b"anything: even an error answer shows that the connection was accepted")
print("answered" if socket.poll(1000) else "silence")
"""


@pytest.mark.skipif(UID != 0, reason="only root can become another user")
def test_another_user_at_the_ipc_socket(setup: Setup, socket_folder: Path) -> None:
    setup.tcp = f"ipc://{socket_folder}/w"
    with serving(setup.exposed, setup.tcp) as worker:
        # the folder's mode is the first lock; open it to try the second
        (socket_folder / "w").chmod(0o777)
        socket_folder.chmod(0o755)
        command = [sys.executable, "-c", _OTHER_USER, setup.tcp]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert result.stdout == "silence\n", result.stderr
        assert worker.answered == worker.refused == 0
        socket_folder.chmod(0o700)
        assert setup.hello() == 1


def test_guarded_sockets_enforce_the_domain(context: Context, curve: Admission) -> None:
    socket = context.socket(zmq.ROUTER)
    _, secret = zmq.curve_keypair()
    curve.guard(socket, secret)
    assert socket.getsockopt(zmq.ZAP_DOMAIN) == DOMAIN
    assert socket.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1
    assert socket.curve_server
    socket.disable_monitor()
    socket.close()
