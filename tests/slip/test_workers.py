"""Seats and who sits in them, with connections that a test makes up; real workers are in tests/end_to_end/test_several_workers."""

from __future__ import annotations

import logging
import threading
from typing import Any, cast

import pytest

from cloven.bundle.manifest import ExposedGroup
from cloven.bundle.placement import WHOLE, Part
from cloven.errors import BadInput, ForeignBundle, PeerRefused, RunError, WorkerRefused, WorkerTimeout, WorkerUnreachable
from cloven.field.freivalds import Freivalds
from cloven.slip.workers import PATIENCE, Workers, seat_addresses
from cloven.wire.channel import Channel
from tests.helpers import random_codes, verifier

GROUPS = tuple(ExposedGroup(rows, 10, "x", f"g{number}", "0" * 64) for number, rows in enumerate((30, 10, 20, 20)))
GONE = WorkerUnreachable("layer: no worker at a")


class Connection:
    """As much of a channel as a seat needs."""

    def __init__(self, network: Network, address: str, patience: float | None) -> None:
        self.network, self.address, self.patience = network, address, patience
        self.timeout, self.simulated_rtt, self.part, self.closed = 20.0, 0.0, "", False
        self.watcher: object = None

    def hello(self) -> int:
        self.part = self.network.parts.get(self.address, "")
        answer = self.network.answers.get(self.address, len(GROUPS))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.closed = True


class Network:
    """Who answers what: groups served, or an error; which part each holds. Records connections and checks."""

    def __init__(self, parts: dict[str, str] | None = None, **answers: int | Exception) -> None:
        self.parts, self.answers = parts or {}, answers
        self.opened: list[Connection] = []
        self.checked: list[tuple[str, int, Part]] = []

    def connect(self, address: str, patience: float | None) -> Channel:
        self.opened.append(Connection(self, address, patience))
        return cast(Channel, self.opened[-1])

    def check(self, worker: str, group: int, part: Part) -> Freivalds:
        self.checked.append((worker, group, part))
        return verifier(random_codes(2, 2))

    def workers(self, text: str, placement: str = "replicas") -> Workers:
        return Workers(text, placement, GROUPS, self.connect, self.check)

    @property
    def addresses(self) -> list[str]:
        return [one.address for one in self.opened]


# --- addresses


@pytest.mark.parametrize(
    ("text", "placement", "seats"),
    [
        ("a", "replicas", [["a"]]),
        ("a,b", "replicas", [["a", "b"]]),
        ("a b", "replicas", [["a", "b"]]),
        ("a,b c", "replicas", [["a", "b", "c"]]),
        ("a b", "layers", [["a"], ["b"]]),
        ("a,b c,d", "rows", [["a", "b"], ["c", "d"]]),
        (" a,  b\tc\n", "layers", [["a"], ["b"], ["c"]]),
        ("a,,b,", "rows", [["a", "b"]]),
        ("a", "layers", [["a"]]),
    ],
)
def test_seat_addresses(text: str, placement: str, seats: list[list[str]]) -> None:
    assert seat_addresses(text, placement) == seats


@pytest.mark.parametrize(
    ("text", "placement", "says"),
    [
        ("", "replicas", "give the worker's address"),
        ("  ", "rows", "give the worker's address"),
        (",", "replicas", "give the worker's address"),
        ("a ,", "layers", "give the worker's address"),
        ("a a", "layers", "given twice"),
        ("a,a", "replicas", "given twice"),
        ("a,b b", "rows", "given twice"),
        ("a", "Rows", "placement 'Rows': choose one of replicas, layers, rows"),
        ("a", "", "choose one of"),
    ],
)
def test_bad_addresses(text: str, placement: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        seat_addresses(text, placement)


# --- who holds what


def test_shares() -> None:
    def held(text: str, placement: str, parts: dict[str, str] | None = None) -> list[list[tuple[int, str]]]:
        workers = Network(parts).workers(text, placement)
        return [[(rows, seat.address) for rows, seat in workers.shares(group)] for group in range(4)]

    assert held("a b", "replicas") == [[(30, "a")], [(10, "a")], [(20, "a")], [(20, "a")]]
    assert held("a b", "layers") == [[(30, "a")], [(10, "a")], [(20, "b")], [(20, "b")]]
    assert held("a b c", "rows", {name: f"rows:{number}/3" for number, name in enumerate("abc", 1)}) == [
        [(10, "a"), (10, "b"), (10, "c")],
        [(3, "a"), (3, "b"), (4, "c")],
        [(6, "a"), (7, "b"), (7, "c")],
        [(6, "a"), (7, "b"), (7, "c")],
    ]
    assert held("a", "rows") == [[(30, "a")], [(10, "a")], [(20, "a")], [(20, "a")]]  # one worker: everything


def test_too_many_workers_connect_to_nobody() -> None:
    network = Network()
    with pytest.raises(BadInput, match="placement 'layers' over 5 workers: this bundle can be spread over 4 at most"):
        network.workers("a b c d e", "layers")
    assert network.opened == []


@pytest.mark.parametrize(
    ("text", "placement", "held", "says"),
    [
        ("a", "replicas", "layers:1/2", "a: the worker holds part layers:1/2; this placement needs one with no --part"),
        ("a b", "layers", "rows:1/2", "a: .*part rows:1/2.* needs one with --part layers:1/2, or with everything"),
        ("a b", "layers", "layers:2/2", "a: .*part layers:2/2.*--part layers:1/2"),
        ("a b", "layers", "layers:1/3", "a: .*part layers:1/3.*--part layers:1/2"),
        ("a b", "rows", "layers:1/2", "a: .*part layers:1/2.*--part rows:1/2"),
        ("a b", "rows", "", "a: the worker holds everything; the placement by rows needs one with --part rows:1/2"),
    ],
)
def test_a_worker_with_another_part(text: str, placement: str, held: str, says: str) -> None:
    network = Network({"a": held})
    with pytest.raises(BadInput, match=says):
        network.workers(text, placement)
    assert network.addresses == ["a"] and network.opened[0].closed


def test_a_worker_with_another_number_of_groups() -> None:
    network = Network(b=3)
    with pytest.raises(ForeignBundle, match="b: the worker serves 3 groups, the bundle has 4"):
        network.workers("a b", "layers")
    assert [one.closed for one in network.opened] == [True, True]  # the first one's connection too


def test_a_worker_with_everything_serves_layers() -> None:
    assert Network({"b": "layers:2/2"}).workers("a b", "layers").address == "a b"


# --- absence


def test_patience_only_where_there_is_a_replica() -> None:
    network = Network()
    network.workers("a,b c", "layers")
    assert [(one.address, one.patience) for one in network.opened] == [("a", PATIENCE), ("c", None)]


@pytest.mark.parametrize("error", [WorkerUnreachable("no"), WorkerTimeout("no")])
def test_the_first_that_answers_is_used(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    network = Network(a=error, b=error)
    with caplog.at_level(logging.WARNING, "cloven"):
        workers = network.workers("a,b,c,d")
    assert workers.address == "c" and network.addresses == ["a", "b", "c"]
    assert [one.closed for one in network.opened] == [True, True, False]
    assert [f"{name} does not answer: a replica takes its place" in caplog.text for name in "abcd"] == [True, True, False, False]
    del network.answers["a"]
    workers.seats[0].move(workers.seats[0].channel(), GONE)
    assert workers.address == "d"  # the circle goes on where it was


def test_nobody_answers() -> None:
    network = Network(a=WorkerUnreachable("no worker at a"), b=WorkerTimeout("no answer from b"))
    with pytest.raises(WorkerTimeout, match="no answer from b"):
        network.workers("a,b")
    assert all(one.closed for one in network.opened)


@pytest.mark.parametrize("error", [WorkerRefused("version"), PeerRefused("key"), ForeignBundle("another")])
def test_a_worker_that_refuses_is_not_passed_over(error: Exception) -> None:
    network = Network(a=error)
    with pytest.raises(type(error)):
        network.workers("a,b")
    assert network.addresses == ["a"]


# --- moving


def test_moving_in_a_circle(caplog: pytest.LogCaptureFixture) -> None:
    network = Network(b=WorkerUnreachable("no"))
    workers = network.workers("a,b,c")
    seat = workers.seats[0]
    for expected in ("c", "a", "c"):
        old = seat.channel()
        with caplog.at_level(logging.WARNING, "cloven"):
            seat.move(old, GONE)
        assert workers.address == expected and cast(Any, old).closed and not cast(Any, seat.channel()).closed
    assert "a is gone: its part of the bundle moves to c" in caplog.text
    assert sum(not one.closed for one in network.opened) == 1


def test_what_was_set_on_the_connection_stays_set() -> None:
    workers = Network().workers("a,b")
    assert workers.watcher is None
    workers.timeout, workers.simulated_rtt = 3.0, 0.01

    def watcher(*_: object) -> None:
        raise AssertionError("nothing is sent")

    workers.watcher = watcher
    workers.seats[0].move(workers.seats[0].channel(), GONE)
    assert (workers.address, workers.timeout, workers.simulated_rtt) == ("b", 3.0, 0.01)
    assert workers.watcher is watcher


def test_without_a_replica_the_error_itself() -> None:
    workers = Network().workers("a")
    with pytest.raises(WorkerUnreachable) as caught:
        workers.seats[0].move(workers.seats[0].channel(), GONE)
    assert caught.value is GONE and not cast(Any, workers.seats[0].channel()).closed


@pytest.mark.parametrize("error", [GONE, WorkerTimeout("layer: no answer within 3 s")])
def test_all_dead(error: RunError) -> None:
    """The error that was given, of its kind; the seat stays where it was, so that a restarted worker is found again."""
    network = Network()
    workers = network.workers("a,b,c")
    network.answers = {"b": WorkerUnreachable("no"), "c": WorkerTimeout("no")}
    channel = workers.seats[0].channel()
    for _ in range(2):
        with pytest.raises(type(error), match=f"^{error}; no replica of it answers either$") as caught:
            workers.seats[0].move(channel, error)
        assert caught.value.__cause__ is error
    assert workers.address == "a" and workers.seats[0].channel() is channel and not cast(Any, channel).closed
    assert network.addresses == ["a", "b", "c", "b", "c"]


@pytest.mark.parametrize("error", [WorkerRefused("version"), PeerRefused("key"), ForeignBundle("another")])
def test_a_replica_that_refuses_is_passed_over_and_an_error_if_there_is_no_other(error: Exception) -> None:
    network = Network()
    workers = network.workers("a,b,c")
    network.answers = {"b": error, "c": WorkerUnreachable("c")}
    with pytest.raises(type(error)):
        workers.seats[0].move(workers.seats[0].channel(), GONE)
    assert workers.address == "a" and network.addresses == ["a", "b", "c"] and network.opened[1].closed
    network.answers = {"b": error}
    workers.seats[0].move(workers.seats[0].channel(), GONE)
    assert workers.address == "c"


def test_a_move_that_another_thread_has_made_is_not_made_again() -> None:
    network = Network()
    seat = network.workers("a,b").seats[0]
    old = seat.channel()
    threads = [threading.Thread(target=seat.move, args=(old, GONE)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seat.address == "b" and network.addresses == ["a", "b"]


def test_no_move_after_the_end() -> None:
    network = Network()
    workers = network.workers("a,b")
    channel = workers.seats[0].channel()
    workers.close()
    with pytest.raises(WorkerUnreachable) as caught:
        workers.seats[0].move(channel, GONE)
    assert caught.value is GONE and network.addresses == ["a"]


# --- checks


def test_a_check_for_every_worker_and_group_once() -> None:
    network = Network()
    workers = network.workers("a,b")
    seat = workers.seats[0]
    first = seat.freivalds(0)
    channel, check = seat.current(0)
    assert check is first and channel is seat.channel() and seat.freivalds(1) is not first
    seat.move(channel, GONE)
    other_channel, other = seat.current(0)
    assert other is not first and other_channel is not channel
    seat.move(other_channel, GONE)
    assert seat.current(0)[1] is first  # its own again
    assert network.checked == [("a", 0, WHOLE), ("a", 1, WHOLE), ("b", 0, WHOLE)]


def test_a_check_of_a_part() -> None:
    network = Network({"a": "rows:1/2", "b": "rows:2/2"})
    for seat in network.workers("a b", "rows").seats:
        seat.freivalds(3)
    assert network.checked == [("a", 3, Part("rows", 1, 2)), ("b", 3, Part("rows", 2, 2))]


def test_close() -> None:
    network = Network({"a": "layers:1/2"})
    workers = network.workers("a b", "layers")
    for seat in workers.seats:
        seat.freivalds(0)
    workers.close()
    workers.close()
    assert all(one.closed for one in network.opened) and not any(seat._checks for seat in workers.seats)
