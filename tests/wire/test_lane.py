"""Both ends of a lane, in one process and in two."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cloven.wire.lane as lane_module
from cloven.wire.lane import _WORDS, CAPACITY, CLIENT, SERVER, Lane, LaneGone, fits, lanes_available
from cloven.wire.limits import MAX_HEADER_BYTES

pytestmark = pytest.mark.skipif(not lanes_available(), reason="no compiler built the bell, or this is not Linux")


@pytest.fixture
def ends() -> Iterator[tuple[Lane, Lane]]:
    a, b = socket.socketpair()
    server = Lane.offered(a)
    client = Lane.taken(b)
    yield client, server
    client.close()
    server.close()


def send(end: Lane, frames: list[Any]) -> None:
    end.send(frames)
    end.ring()


def in_memory(end: Lane) -> bytes:
    return bytes(end._map)


def test_a_request_and_its_answer(ends: tuple[Lane, Lane]) -> None:
    client, server = ends
    for number in range(3):
        send(client, [b"header %d" % number, memoryview(b"secret rows")])
        assert server.receive(1) == [b"header %d" % number, bytearray(b"secret rows")]
        send(server, [b"answer"])
        assert client.receive(1) == [b"answer"]
    assert b"secret" not in in_memory(server) and b"answer" not in in_memory(client)  # what was taken is overwritten


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=MAX_HEADER_BYTES), st.none() | st.binary(max_size=3000))
def test_any_frames(ends: tuple[Lane, Lane], header: bytes, payload: bytes | None) -> None:
    client, server = ends
    frames: list[Any] = [header] if payload is None else [header, payload]
    send(client, frames)
    assert server.receive(1) == frames
    send(server, frames)
    assert client.receive(1) == frames


def test_the_largest_payload(ends: tuple[Lane, Lane]) -> None:
    client, server = ends
    payload = os.urandom(CAPACITY)
    send(client, [b"h", payload])
    assert server.receive(1) == [b"h", payload]
    assert not any(in_memory(client)[lane_module._FIRST :])


def test_the_answer_is_waited_for(ends: tuple[Lane, Lane]) -> None:
    client, server = ends
    started = time.monotonic()
    send(client, [b"early"])
    assert client.receive(0.2) is None and 0.15 < time.monotonic() - started < 5
    thread = threading.Thread(target=lambda: (server.receive(5), time.sleep(0.2), send(server, [b"late"])))
    thread.start()
    assert client.receive(5) == [b"late"]
    thread.join()


def test_what_is_parsed_cannot_change(ends: tuple[Lane, Lane]) -> None:
    client, server = ends
    send(client, [b"header", b"before"])
    frames = server.receive(1)
    send(client, [b"HEADER", b"after!"])
    assert frames == [b"header", b"before"]


@pytest.mark.parametrize(("word", "value"), [(1, MAX_HEADER_BYTES + 1), (2, CAPACITY + 2), (1, 2**32 - 1), (2, 2**32 - 1)])
@pytest.mark.parametrize("writer", [CLIENT, SERVER])
def test_impossible_lengths(ends: tuple[Lane, Lane], word: int, value: int, writer: int) -> None:
    client, server = ends
    send(client, [b"h"])
    if writer == SERVER:
        server.receive(1)
        send(server, [b"a"])
    server._words[_WORDS[writer] + word] = value
    with pytest.raises(LaneGone, match="impossible"):
        (server if writer == CLIENT else client).receive(1)


def test_an_answer_with_another_number(ends: tuple[Lane, Lane]) -> None:
    client, server = ends
    send(client, [b"h"])
    server._seen = 77
    send(server, [b"an answer to what nobody asked"])
    with pytest.raises(LaneGone, match="impossible number"):
        client.receive(1)


def test_the_numbers_go_round(ends: tuple[Lane, Lane]) -> None:
    client, server = ends
    for end in ends:
        end._seen = 2**32 - 1
    for side in (CLIENT, SERVER):
        client._words[_WORDS[side]] = 2**32 - 1
    send(client, [b"the next one is 0"])
    assert server.receive(1) == [b"the next one is 0"]
    send(server, [b"a"])
    assert client.receive(1) == [b"a"]


def test_who_is_gone(ends: tuple[Lane, Lane]) -> None:
    client, server = ends
    assert not client.other_is_gone() and not server.other_is_gone()
    client.close()
    assert server.other_is_gone()


def test_a_killed_process_is_gone(tmp_path: Path) -> None:
    code = """
import socket, sys, time
from cloven.wire.lane import Lane
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
lane = Lane.taken(connection)
time.sleep(60)
"""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s")]) as process:
            server = Lane.offered(listener.accept()[0])
            assert not server.other_is_gone()
            process.kill()
            process.wait()
    assert server.other_is_gone()
    server.close()


def test_nobody_can_truncate_the_memory() -> None:
    """A process whose mapped memory is truncated is killed by its next look at it."""
    a, b = socket.socketpair()
    server = Lane.offered(a)
    _, (descriptor,), _, _ = socket.recv_fds(b, 16, 1)
    for size in (0, 4096, 2**30):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)
    server.close()
    b.close()


@pytest.mark.parametrize("change", ["shorter", "not sealed", "nothing", "gone"])
def test_what_is_no_lane(change: str) -> None:
    a, b = socket.socketpair()
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096 if change == "shorter" else lane_module._SIZE)
    if change == "shorter":
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, lane_module._seals())
    if change == "nothing":
        a.send(b"lane")
    elif change != "gone":
        socket.send_fds(a, [b"lane"], [descriptor])
    a.close()
    os.close(descriptor)
    with pytest.raises(LaneGone):
        Lane.taken(b)
    b.close()


def test_another_users_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    a, b = socket.socketpair()
    for take, end in ((Lane.offered, a), (Lane.taken, b)):
        with pytest.raises(LaneGone, match="another user"):
            take(end)
        end.close()


def test_no_memory_for_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    a, b = socket.socketpair()
    with pytest.raises(LaneGone, match="No space left"):
        Lane.offered(a)
    a.close()
    b.close()


def test_generations_never_come_again(ends: tuple[Lane, Lane]) -> None:
    """A step of one lane must not go on in the next one."""
    seen = [end.generation for end in ends]
    for end in ends:
        send(end, [b"h"])
        seen.append(end.generation)
    assert len(set(seen)) == 4


def test_a_forked_process_has_no_lane(ends: tuple[Lane, Lane], monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = ends
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for attempt in (lambda: client.send([b"h"]), lambda: server.receive(0), lambda: client.raw(0, 0, 0, 0, 0, 0, again=False)):
        with pytest.raises(LaneGone, match="forked"):
            attempt()
    client.close()  # of the child's copy: the parent's stays
    monkeypatch.undo()
    assert not server.other_is_gone()


def test_what_fits() -> None:
    assert fits([b"h"], 0) and fits([b"h", bytes(CAPACITY)], CAPACITY)
    assert not fits([b"h"], None) and not fits([b"h", bytes(CAPACITY + 1)], 0) and not fits([b"h"], CAPACITY + 1)


def test_lanes_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_LANES", "0")
    assert not lanes_available()
