"""Reading metrics from whoever answers."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cloven.errors import BadInput
from cloven.metrics import scrape as module
from cloven.metrics.catalog import Sample
from cloven.metrics.endpoint import MetricsEndpoint
from cloven.metrics.scrape import MOST_BYTES, Away, metrics_url, open_client, scrape
from tests.helpers import free_port

Behave = Callable[[socket.socket], None]
OK = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n"
GOOD = b"cloven_lanes 1.0\n"


@contextlib.contextmanager
def answering(behave: Behave) -> Iterator[str]:
    """A server of one connection that behaves as a test wants."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as peer:
                peer.settimeout(10)
                peer.recv(65536)
                behave(peer)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/metrics"
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join(15)
        assert not thread.is_alive()


def read(url: str) -> module.Scrape:
    with open_client() as client:
        return scrape(client, url)


def test_what_an_endpoint_says() -> None:
    def samples() -> list[Sample]:
        return [
            Sample("cloven_rows_total", 5.0, ("lane",)),
            Sample("cloven_rows_total", 7.0, ("socket",)),
            Sample("cloven_session_pads_ready", 4.0, ("a",)),
            Sample("cloven_session_pads_ready", 3.0, ("b",)),
        ]

    with MetricsEndpoint("127.0.0.1", 0, "enclave", [samples]) as endpoint:
        found = read(endpoint.address)
    assert found.total("cloven_rows_total") == 12.0 and found.total("cloven_lanes") is None
    assert found.total("cloven_lanes", "cloven_rows_total") == 12.0
    assert found.least("cloven_session_pads_ready") == 3.0 and found.least("cloven_lanes") is None
    assert found.label("cloven_process_info", "role") == "enclave" and found.label("cloven_lanes", "role") == ""
    assert found.total("process_resident_memory_bytes") is not None
    assert abs(found.at - time.monotonic()) < 10


def test_what_is_not_ours_is_left_out() -> None:
    with answering(lambda peer: peer.sendall(OK + GOOD + b"another_metric 5\ncloven_unknown 6\ncloven_waiting_requests NaN\n")) as url:
        assert read(url).values == {("cloven_lanes", ()): 1.0}


ANSWERS = {
    "not found": (b"HTTP/1.0 404 Not Found\r\n\r\n" + GOOD, "404"),
    "a redirection": (b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/metrics\r\n\r\n", "302"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "no answer"),
    "nothing": (b"", "no answer"),
    "no metrics": (OK + b"<html>hello</html>", "metrics"),
    "a quotation without end": (OK + b'cloven_lanes{a="', "metrics"),
    "no number": (OK + b"cloven_lanes one\n", "metrics"),
    "metrics of others": (OK + b"other 1\n", "no metrics of cloven"),
    "no text": (OK + bytes(range(256)), "metrics"),
    "too long": (OK + GOOD * (MOST_BYTES // len(GOOD) + 2), "too long"),
    "a bomb": (OK.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") + b"\x1f\x8b\x08" + bytes(100), "metrics"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200_000, "no answer"),
}


@pytest.mark.parametrize(("answer", "why"), ANSWERS.values(), ids=ANSWERS.keys())
def test_answers_that_are_none(answer: bytes, why: str) -> None:
    with answering(lambda peer: peer.sendall(answer)) as url, pytest.raises(Away, match=why):
        read(url)


def test_an_answer_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.5)

    def drip(peer: socket.socket) -> None:
        peer.sendall(OK)
        for _ in range(100):
            peer.sendall(b"#\n")
            time.sleep(0.05)

    started = time.monotonic()
    with answering(drip) as url:
        with pytest.raises(Away, match="too slow"):
            read(url)
        assert time.monotonic() - started < 4


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with answering(lambda peer: time.sleep(1)) as url, pytest.raises(Away, match="no answer in time"):
        read(url)


def test_nobody() -> None:
    with pytest.raises(Away, match="nobody listens there"):
        read(f"http://127.0.0.1:{free_port()}/metrics")
    with pytest.raises(Away):
        read("http://no.such.host.invalid:9/metrics")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:9401", "http://127.0.0.1:9401/metrics"),
        ("http://127.0.0.1:9401/", "http://127.0.0.1:9401/metrics"),
        ("127.0.0.1:9401", "http://127.0.0.1:9401/metrics"),
        ("http://[::1]:9401/metrics", "http://[::1]:9401/metrics"),
        ("https://example.org/cloven/metrics", "https://example.org/cloven/metrics"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    assert metrics_url(given) == url


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("", "no address of metrics"),
        ("http://", "no address of metrics"),
        ("ftp://a:1", "no address of metrics"),
        ("ipc://x/y", "no address of metrics"),
        ("tcp://127.0.0.1:5555", "no address of metrics"),
        ("http://a b:1", "no address of metrics"),
        ("http://a:1/\x1b[31m", "no address of metrics"),
        ("http://a:99999", "no address of metrics"),
        ("http://a:port", "no address of metrics"),
        ("http://[::1:1", "no address of metrics"),
        ("localhost", "give the port too"),
        ("http://user:word@a:1", "without a name"),
        ("http://a:1?x=1", "without a name"),
    ],
)
def test_what_is_no_address(given: str, match: str) -> None:
    with pytest.raises(BadInput, match=match) as error:
        metrics_url(given)
    assert "word" not in str(error.value).replace("password", "")
