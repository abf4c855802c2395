"""A real server and a real channel over ipc: what goes through the lane, and what happens when either side is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import cloven.wire.lane_service as lane_service
from cloven.errors import WorkerRefused, WorkerTimeout, WorkerUnreachable
from cloven.wire.channel import Channel
from cloven.wire.keys import generate_keys, trusted_keys, worker_keys
from cloven.wire.lane import PREFIX, Lane, LaneGone, lanes_available
from cloven.wire.lane_client import LaneClient
from cloven.wire.lane_service import LaneService
from cloven.wire.schema import AskLane, Laned
from tests.wire.test_schema import BUNDLE, COLOURS, Ask, Tell
from tests.wire.test_server import Colours, serving

pytestmark = pytest.mark.skipif(not lanes_available(), reason="no compiler built the bell, or this is not Linux")

SERVE = """
import sys
from tests.wire.test_server import Colours
Colours(sys.argv[1]).serve()
"""


def channel_to(address: str, timeout: float = 5) -> Channel:
    channel = Channel(address, BUNDLE, timeout=timeout, schema=COLOURS, peer="painter")
    channel.hello()
    return channel


def told(channel: Channel, colour: str = "blue", expected: int | None = 3) -> bytes:
    def parse(message: Any, payload: memoryview | None) -> bytes | None:
        return bytes(payload) if payload is not None and message == Tell(message.id, colour) else None

    return channel.exchange("a colour", Ask(channel.next_id(), colour), [], parse, expected=expected)


@pytest.fixture
def address(tmp_path: Path) -> str:
    (tmp_path / "s").mkdir(mode=0o700)
    return f"ipc://{tmp_path}/s/painter"


def no_socket(*_: Any) -> None:
    raise AssertionError("this went through the socket")


def test_exchanges_take_the_lane(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(address) as server:
        channel = channel_to(address)
        monkeypatch.setattr(channel, "_send", no_socket)
        assert told(channel) == told(channel) == b"sky"
        assert server.peers[-2:] == ["local", "local"] and server.answered >= 2
        total = channel.telemetry.total()
        assert total.exchanges == 4 and total.bytes_down > 6  # hello and the lane itself, and two colours
        with pytest.raises(AssertionError, match="socket"):
            told(channel, expected=None)
        channel.close()


def test_a_refusal_and_a_failure_through_the_lane(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(address) as server:
        channel = channel_to(address)
        monkeypatch.setattr(channel, "_send", no_socket)
        with pytest.raises(WorkerRefused, match="its log says why"):
            told(channel, "red")
        assert told(channel) == b"sky" and server.refused == 1
        channel.close()


def test_a_folder_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 200)
    folder.mkdir(mode=0o700)
    service, client = LaneService(folder, lambda frames, peer: [b"told"]), LaneClient(folder)
    client.take(service.offer("local"))
    with client.using() as lane:
        lane.send([b"asked"])
        answer = client.answer(lane, time.monotonic() + 5)
    assert answer is not None and bytes(answer[0]) == b"told"
    client.leave()
    service.close()


def test_without_lanes_on_either_side(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(address):
        monkeypatch.setattr(lane_service, "lanes_available", lambda: False)
        channel = channel_to(address)
        assert channel.lane_generation < 0 and told(channel) == b"sky"
        channel.close()
        monkeypatch.undo()
        monkeypatch.setenv("CLOVEN_LANES", "0")
        channel = channel_to(address)
        assert channel.lane_generation < 0 and told(channel) == b"sky"
        channel.close()


def test_a_lane_that_cannot_be_joined(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: socket.socket) -> Lane:
        raise LaneGone("another container")

    monkeypatch.setattr(Lane, "taken", unreachable)
    with serving(address):
        channel = channel_to(address)
        assert channel.lane_generation < 0 and told(channel) == b"sky"
        channel.close()


def test_lanes_end_with_their_clients_and_their_server(address: str) -> None:
    with serving(address) as server:
        channels = [channel_to(address) for _ in range(3)]
        assert server._lanes is not None
        threads = list(server._lanes._threads)
        assert len(threads) == 3 and all(thread.is_alive() for thread in threads)
        channels[0].close()
        threads[0].join(5)
        assert [thread.is_alive() for thread in threads] == [False, True, True]
        assert told(channels[1]) == b"sky"
    assert not any(thread.is_alive() for thread in threads)
    for channel in channels:
        channel.close()
    assert not list(Path(address.removeprefix("ipc://")).parent.glob(PREFIX + "*"))


def test_a_lane_that_nobody_joins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lane_service, "_JOIN_SECONDS", 0.1)
    service = LaneService(tmp_path, lambda frames, peer: [b""])
    name = service.offer("local")
    assert (tmp_path / name).exists()
    service._threads[0].join(5)
    assert not service._threads[0].is_alive() and not (tmp_path / name).exists()


def test_no_thread_for_a_lane(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert LaneService(tmp_path, lambda frames, peer: [b""]).offer("local") == "" and not list(tmp_path.iterdir())


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    assert LaneService(tmp_path / "gone", lambda frames, peer: [b""]).offer("local") == ""


def test_no_lane_goes_round_curve(tmp_path: Path, address: str) -> None:
    generate_keys(tmp_path / "keys")
    with serving(address, keys=worker_keys(tmp_path / "keys" / "worker")):
        channel = Channel(address, BUNDLE, timeout=5, schema=COLOURS, peer="painter", keys=trusted_keys(tmp_path / "keys" / "trusted"))
        channel.hello()
        assert channel.lane_generation < 0 and told(channel) == b"sky"
        request = AskLane(channel.next_id(), BUNDLE)
        assert channel.exchange("lane", request, [], lambda m, _: m.segment if isinstance(m, Laned) else None) == ""
        channel.close()


def test_the_number_of_lanes_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lane_service, "MOST_LANES", 2)
    service = LaneService(tmp_path, lambda frames, peer: [b""])
    names = [service.offer("local") for _ in range(3)]
    assert names[0] and names[1] and names[2] == ""
    service.close()


def test_a_client_that_writes_nonsense_loses_its_lane_alone(address: str) -> None:
    with serving(address) as server:
        good, bad = channel_to(address), channel_to(address)
        lane = bad._lane._lane
        assert lane is not None and server._lanes is not None
        lane._words[18] = 2**31
        lane._library.cloven_bell_ring(lane._bells[0], 1)
        server._lanes._threads[1].join(5)
        assert not server._lanes._threads[1].is_alive()
        assert told(good) == b"sky" and told(bad) == b"sky"  # by the socket
        good.close()
        bad.close()


def test_no_answer_in_time(address: str) -> None:
    class Slow(Colours):
        wait = 0.0

        def answer(self, frames: list[Any], peer: str) -> list[Any]:
            time.sleep(self.wait)
            return super().answer(frames, peer)

    server = Slow(address)
    thread = threading.Thread(target=server.serve)
    thread.start()
    channel = channel_to(address, timeout=0.5)
    server.wait = 4.0
    started = time.monotonic()
    with pytest.raises(WorkerTimeout, match=r"within 0\.5 s"):
        told(channel)
    assert time.monotonic() - started < 3.5  # not by the answer that came at last
    server.wait = 0.0
    time.sleep(4.0)
    assert told(channel) == b"sky"  # the late answer found nobody
    assert channel.lane_generation > 0  # a new one
    channel.close()
    server.stop()
    thread.join(10)


def test_a_killed_server_and_one_that_comes_back(address: str, tmp_path: Path) -> None:
    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", SERVE, address], cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 60
        while not Path(address.removeprefix("ipc://")).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return process

    process = start()
    channel = channel_to(address, timeout=90)  # a process that starts on a busy machine takes its time
    assert channel.lane_generation > 0 and told(channel) == b"sky"
    process.kill()
    process.wait()
    Path(address.removeprefix("ipc://")).unlink()
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(told(channel)))
    asking.start()
    time.sleep(0.3)
    process = start()
    asking.join(90)
    assert answers == [b"sky"] and channel.telemetry.total().resent >= 1
    assert told(channel) == b"sky" and channel.lane_generation > 0  # the new server's lane
    channel.timeout = 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    with pytest.raises(WorkerUnreachable, match="is `cloven painter` running there"):
        told(channel)
    assert time.monotonic() - started < 5
    channel.close()
    assert os.environ.get("CLOVEN_LANES") is None
