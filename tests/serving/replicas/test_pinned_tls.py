"""Real connections: only the two that know each other's certificates can talk."""

from __future__ import annotations

import socket
import ssl
import threading

import pytest

from cloven.serving.replicas.pinned_tls import Identity


def exchange(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """What the client reads; an ssl.SSLError of either side."""
    failures: list[Exception] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            try:
                connection, _ = listener.accept()
                connection.settimeout(10)
                with server.wrap_socket(connection, server_side=True) as wrapped:
                    wrapped.sendall(wrapped.recv(5).upper())
            except (ssl.SSLError, OSError) as error:
                failures.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=10) as plain, client.wrap_socket(plain) as wrapped:
                assert wrapped.version() == "TLSv1.3"
                wrapped.sendall(b"hello")
                return wrapped.recv(5)
        except (ssl.SSLError, ConnectionError):
            return b""
        finally:
            thread.join(10)


@pytest.fixture(scope="module")
def three() -> tuple[Identity, Identity, Identity]:
    return Identity(), Identity(), Identity()


def test_the_two(three: tuple[Identity, Identity, Identity]) -> None:
    front, replica, _ = three
    server, client = replica.context(front.certificate, server=True), front.context(replica.certificate, server=False)
    assert exchange(server, client) == b"HELLO"
    assert exchange(server, client) == b"HELLO"


def test_a_third_one_can_neither_ask_nor_answer(three: tuple[Identity, Identity, Identity]) -> None:
    front, replica, other = three
    server, client = replica.context(front.certificate, server=True), front.context(replica.certificate, server=False)
    assert exchange(server, other.context(replica.certificate, server=False)) == b""
    assert exchange(other.context(front.certificate, server=True), client) == b""


def test_nobody_without_a_certificate(three: tuple[Identity, Identity, Identity]) -> None:
    front, replica, _ = three
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname = False
    anonymous.verify_mode = ssl.CERT_NONE
    assert exchange(replica.context(front.certificate, server=True), anonymous) == b""


def test_a_certificate_alone_is_not_enough(three: tuple[Identity, Identity, Identity]) -> None:
    """Whoever has read it on its way through Ray lacks the key."""
    front, replica, other = three
    thief = Identity()
    thief.certificate = front.certificate
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        thief.context(replica.certificate, server=False)
    assert other.certificate != front.certificate


def test_what_can_be_read(three: tuple[Identity, Identity, Identity]) -> None:
    front, *_ = three
    assert repr(front) == "Identity(<secret>)" and "PRIVATE" not in front.certificate and b"ENCRYPTED PRIVATE KEY" in front._key
