"""Both ends of a lane, in one process and in two."""

from __future__ import annotations

import os
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
from cloven.wire.lane import _WORDS, CAPACITY, CLIENT, PREFIX, SERVER, Lane, LaneGone, fits, lanes_available
from cloven.wire.limits import MAX_HEADER_BYTES

pytestmark = pytest.mark.skipif(not lanes_available(), reason="no compiler built the bell, or this is not Linux")

FOLDER = Path("/dev/shm")


@pytest.fixture
def ends() -> Iterator[tuple[Lane, Lane]]:
    server = Lane.create()
    client = Lane.join(server.name)
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


def test_the_file(ends: tuple[Lane, Lane]) -> None:
    server = Lane.create()
    path = FOLDER / server.name
    assert server.name.startswith(PREFIX) and path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 >= 2 * CAPACITY  # it is all there: what is missing later would be a signal that kills
    client = Lane.join(server.name)
    assert not path.exists()
    with pytest.raises(LaneGone, match="of that name"):
        Lane.join(server.name)
    client.close()
    server.close()


def test_who_is_gone(ends: tuple[Lane, Lane]) -> None:
    client, server = ends
    assert not client.other_is_gone() and not server.other_is_gone()
    client.close()
    assert server.other_is_gone()


def test_a_killed_process_is_gone() -> None:
    code = "import sys, time; from cloven.wire.lane import Lane; lane = Lane.create(); print(lane.name, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = Lane.join(process.stdout.readline().strip())
        assert not client.other_is_gone()
        process.kill()
        process.wait()
    assert client.other_is_gone()
    client.close()


@pytest.mark.parametrize("change", ["shorter", "open to others", "a link"])
def test_what_is_no_lane(change: str, tmp_path: Path) -> None:
    server = Lane.create()
    path = FOLDER / server.name
    if change == "shorter":
        os.truncate(path, 4096)
    elif change == "open to others":
        path.chmod(0o644)
    else:
        path.rename(FOLDER / (server.name + "x"))
        path.symlink_to(FOLDER / (server.name + "x"))
    try:
        with pytest.raises(LaneGone):
            Lane.join(server.name)
    finally:
        server.close()
        (FOLDER / (server.name + "x")).unlink(missing_ok=True)


def test_no_memory_for_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    before = set(FOLDER.glob(PREFIX + "*"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(LaneGone, match="No space left"):
        Lane.create()
    assert set(FOLDER.glob(PREFIX + "*")) == before


def test_what_fits() -> None:
    assert fits([b"h"], 0) and fits([b"h", bytes(CAPACITY)], CAPACITY)
    assert not fits([b"h"], None) and not fits([b"h", bytes(CAPACITY + 1)], 0) and not fits([b"h"], CAPACITY + 1)


def test_lanes_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVEN_LANES", "0")
    assert not lanes_available()
