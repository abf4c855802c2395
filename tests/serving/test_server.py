from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloven.errors import BadInput, RunError
from cloven.serving.options import ServeOptions
from cloven.serving.server import _allow_files, _NoContents, bind, serve


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """A small application."""
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


class Counted:
    """See `Application`."""

    refused = ended = 0

    def refuse(self) -> None:
        """Counted."""
        self.refused += 1

    def end_answers(self) -> None:
        """Counted."""
        self.ended += 1


def test_another_process_was_quicker() -> None:
    """Both have bound the address before one of them listens."""
    with bind(ServeOptions(port=0)) as first:
        port = first.getsockname()[1]
        with bind(ServeOptions(port=port)) as second:
            first.listen()
            with pytest.raises(RunError, match=f"port {port}: .*in use"):
                serve(answering, Counted(), second, ServeOptions(port=port), lambda: None)


def test_a_socket_that_is_taken() -> None:
    with bind(ServeOptions(port=0)) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port}: Address already in use"):
            bind(ServeOptions(port=port))
    with bind(ServeOptions(port=port)):
        pass


def test_addresses_that_are_not_this_machines() -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises((BadInput, RunError), match=host):
            bind(ServeOptions(host=host, port=0, insecure_open=True))


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = bind(ServeOptions(host="::1", port=0))
    except RunError:
        pytest.skip("no IPv6 loopback here")
    with listener:
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_until_a_signal_and_returns(number: int) -> None:
    """In this process: uvicorn raises the signal again when it has ended, which must not end us."""
    told: list[str] = []
    counted = Counted()
    with bind(ServeOptions(port=0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/path"

        def ready() -> None:
            threading.Thread(target=ask).start()

        def ask() -> None:
            time.sleep(0.05)
            told.append(httpx.get(url).text)
            os.kill(os.getpid(), number)

        kept = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            serve(answering, counted, listener, ServeOptions(), ready)
        finally:
            for one, handler in kept.items():
                signal.signal(one, handler)
            for one in logging.getLogger("uvicorn.error").filters[:]:
                logging.getLogger("uvicorn.error").removeFilter(one)
    assert told == ["/path"] and counted.refused == 1


def test_certificates(tmp_path: Path) -> None:
    nonsense = tmp_path / "pem"
    nonsense.write_text("no certificate")
    with pytest.raises(BadInput, match="no certificate with its key"):
        bind(ServeOptions(port=0, tls_certificate=nonsense, tls_key=nonsense))
    with pytest.raises(BadInput, match="no such file"):
        bind(ServeOptions(port=0, tls_certificate=nonsense, tls_key=tmp_path / "none"))


def test_a_log_without_contents() -> None:
    try:
        raise ValueError("Xylophone")
    except ValueError:
        record = logging.LogRecord("uvicorn.error", logging.ERROR, "x.py", 1, "Exception in %s", ("ASGI",), sys.exc_info())
    assert _NoContents().filter(record)
    written = logging.Formatter().format(record)
    assert "ValueError" in written and "Xylophone" not in written


def test_what_anybody_can_have_logged_is_bounded() -> None:
    found = _NoContents()
    plain = [logging.LogRecord("uvicorn.error", level, "x.py", 1, "so %s", ("be it",), None) for level in (logging.WARNING, logging.INFO)]
    assert found.filter(plain[0]) and plain[0].getMessage() == "so be it"
    assert not any(found.filter(record) for record in plain)
    found._said -= 1
    assert found.filter(plain[1])


@pytest.mark.parametrize(
    ("limits", "after"),
    [((1024, 4096), 4096), ((1024, 10**6), 65_536), ((1024, -1), 65_536), ((10**6, 10**6), None), ((-1, -1), None), ((4096, 4096), None)],
)
def test_open_files(limits: tuple[int, int], after: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never fewer than before."""
    assert resource.RLIM_INFINITY == -1
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: given.append(pair))
    _allow_files()
    assert given == ([] if after is None else [(after, limits[1])])
