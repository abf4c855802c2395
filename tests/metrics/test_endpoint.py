"""The endpoint, asked by Prometheus' own parser, and by peers that mean it ill."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloven.errors import BadInput, RunError
from cloven.metrics import endpoint as module
from cloven.metrics.catalog import Sample
from cloven.metrics.endpoint import MOST_OPEN, MOST_REQUEST_BYTES, MetricsEndpoint


def samples() -> list[Sample]:
    return [Sample("cloven_rows_total", 5.0, ("lane",))]


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    with MetricsEndpoint("127.0.0.1", 0, "worker", [samples]) as endpoint:
        yield endpoint


def get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False, timeout=10)


def connected(endpoint: MetricsEndpoint) -> socket.socket:
    url = httpx.URL(endpoint.address)
    return socket.create_connection((url.host, url.port or 0), timeout=10)


def raw(endpoint: MetricsEndpoint, request: bytes) -> bytes:
    """What the endpoint says before it hangs up; nothing where it resets the connection."""
    with connected(endpoint) as peer:
        answer = b""
        with contextlib.suppress(OSError):  # reset, or hung up already
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
            while piece := peer.recv(65536):
                answer += piece
        return answer


def test_a_scrape(endpoint: MetricsEndpoint) -> None:
    response = get(endpoint.address)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["cloven_rows"].samples[0].value == 5.0
    assert get(endpoint.address + "?a=b").status_code == 200
    assert "Python" not in response.headers["server"]


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metricsx", "/../etc/passwd", "/%2e%2e/metrics"])
def test_there_is_nothing_else(endpoint: MetricsEndpoint, path: str) -> None:
    assert raw(endpoint, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).startswith(b"HTTP/1.0 404")


HOSTILE = {
    "nothing": b"",
    "no HTTP": b"\x00\xff\xfe" * 100,
    "a tls hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "another method": b"DELETE /metrics HTTP/1.1\r\n\r\n",
    "a post with a body": b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000000000\r\n\r\n" + b"x" * 4000,
    "an endless line": b"GET /" + b"a" * 10 * MOST_REQUEST_BYTES,
    "endless headers": b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 10_000,
    "many headers": b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    "markup": b"<script>alert(1)</script> / HTTP/1.1\r\n\r\n",
    "a late version": b"GET /metrics HTTP/99.99\r\n\r\n",
    "a split response": b"GET /x%0d%0aSet-Cookie:%20a HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_requests(endpoint: MetricsEndpoint, request_bytes: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cloven"):
        answer = raw(endpoint, request_bytes)
    assert b"HTTP/1.0 200" not in answer and b"script" not in answer and b"Set-Cookie: a" not in answer
    assert get(endpoint.address).status_code == 200
    assert not caplog.records


def test_a_slow_request_is_hung_up(endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with connected(endpoint) as peer:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 10:  # one byte at a time never ends
                peer.send(b"G")
                time.sleep(0.05)
                peer.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    if peer.recv(1) == b"":
                        break
    assert time.monotonic() - started < 5
    assert get(endpoint.address).status_code == 200


def test_many_connections_that_say_nothing(endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold the places for a time, not the threads of the process for ever; then there is room again."""
    monkeypatch.setattr(module, "SECONDS", 1.0)
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connected(endpoint))
        time.sleep(0.2)
        handling = [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]
        assert len(handling) <= MOST_OPEN
        deadline, status = time.monotonic() + 10, 0
        while status != 200 and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                status = get(endpoint.address).status_code
            time.sleep(0.05)
    assert status == 200


def test_texts_are_made_at_most_so_often(endpoint: MetricsEndpoint) -> None:
    started = time.monotonic()
    for _ in range(5):
        assert get(endpoint.address).status_code == 200
    assert time.monotonic() - started >= 4 * module._SPACING_SECONDS


def test_a_source_that_fails_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> list[Sample]:
        raise ValueError("the secret number is 1234")

    with MetricsEndpoint("127.0.0.1", 0, "worker", [broken]) as endpoint:
        response = get(endpoint.address)
    assert response.status_code == 500 and "1234" not in response.text
    assert "the metrics could not be read" in caplog.text


def test_a_port_that_is_taken(endpoint: MetricsEndpoint) -> None:
    port = httpx.URL(endpoint.address).port or 0
    with pytest.raises(RunError, match=f"cannot listen at 127.0.0.1:{port}"):
        MetricsEndpoint("127.0.0.1", port, "worker", [samples])


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70, ""])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(BadInput, match="no address of this machine"):
        MetricsEndpoint(host, 0, "worker", [samples])


def test_after_close_nobody_listens() -> None:
    endpoint = MetricsEndpoint("127.0.0.1", 0, "worker", [samples])
    endpoint.close()
    with pytest.raises(httpx.ConnectError):
        get(endpoint.address)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6() -> None:
    try:
        endpoint = MetricsEndpoint("::1", 0, "worker", [samples])
    except RunError:
        pytest.skip("no IPv6 loopback here")
    with endpoint:
        assert endpoint.address.startswith("http://[::1]:") and get(endpoint.address).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example", 421), ("evil.example:80", 421), ("localhost:9", 200), ("127.0.0.1", 200), ("[::1]:9", 200)]
)
def test_a_web_page_cannot_ask_by_a_name_of_its_own(endpoint: MetricsEndpoint, host: str, status: int) -> None:
    assert raw(endpoint, f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).startswith(f"HTTP/1.0 {status}".encode())
