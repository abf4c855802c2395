from __future__ import annotations

import threading
import time

import pytest

from cloven.metrics.counts import LANE, NATIVE, SOCKET, Counted, ServerCounts


def test_counting_by_way() -> None:
    counts = ServerCounts()
    counts.answered(SOCKET, Counted(1, 2, 3, 4, 5, 6, 0.5))
    counts.answered(SOCKET, Counted(1, 2, 3, 4, 5, 6, 0.5))
    counts.answered(LANE, Counted(7))
    assert counts.ways() == {SOCKET: Counted(2, 4, 6, 8, 10, 12, 1.0), LANE: Counted(7), NATIVE: Counted()}
    assert counts.total() == Counted(9, 4, 6, 8, 10, 12, 1.0)
    counts.ways()[SOCKET].rows = 100
    assert counts.total().rows == 4  # what is given out is a copy


def test_a_refused_request_is_no_exchange_and_has_bytes() -> None:
    counts = ServerCounts()
    counts.refused(LANE, "size", Counted(exchanges=1, rows=9, tokens=9, hellos=1, bytes_in=5, bytes_out=6, seconds=0.25))
    counts.refused(LANE, "size", Counted())
    counts.refused(SOCKET, "bundle", Counted())
    assert counts.refusals() == {"size": 2, "bundle": 1}
    assert counts.total() == Counted(bytes_in=5, bytes_out=6, seconds=0.25)


def test_what_goes_on_elsewhere_is_read_when_asked_and_stays() -> None:
    counts, elsewhere = ServerCounts(), Counted()
    with pytest.raises(ValueError, match="the lane broke"), counts.live(NATIVE, lambda: elsewhere):
        for _ in range(3):
            elsewhere.exchanges += 1
            elsewhere.rows += 2
        assert counts.total() == Counted(exchanges=3, rows=6)
        raise ValueError("the lane broke")
    elsewhere.exchanges = 100  # nobody looks any more
    assert counts.ways()[NATIVE] == Counted(exchanges=3, rows=6)


def test_two_at_once_are_both_counted() -> None:
    counts, one = ServerCounts(), Counted(exchanges=1)
    with counts.live(NATIVE, lambda: one), counts.live(NATIVE, lambda: one):
        assert counts.total().exchanges == counts.exchanges() == 2
    assert counts.total().exchanges == counts.exchanges() == 2


def test_waiting_for_a_turn() -> None:
    counts, lock, held, done = ServerCounts(), threading.Lock(), threading.Event(), threading.Event()
    with counts.turn(lock):
        assert lock.locked() and counts.waits() == (0, 0.0)  # nobody to wait for

    def hold() -> None:
        with counts.turn(lock):
            held.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    waiter = threading.Thread(target=lambda: counts.turn(lock).__enter__())
    waiter.start()
    deadline = time.monotonic() + 10
    while counts.waits()[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert counts.waits()[0] == 1
    time.sleep(0.02)
    done.set()
    holder.join()
    waiter.join()
    waiting, seconds = counts.waits()
    assert waiting == 0 and seconds > 0.01


def test_a_turn_ends_whatever_happens() -> None:
    counts, lock = ServerCounts(), threading.Lock()
    with pytest.raises(KeyError), counts.turn(lock):
        raise KeyError
    assert not lock.locked()


def test_threads() -> None:
    counts = ServerCounts()

    def count() -> None:
        for _ in range(500):
            counts.answered(SOCKET, Counted(exchanges=1, rows=2))
            counts.refused(SOCKET, "size", Counted(bytes_in=1))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.total() == Counted(exchanges=4000, rows=8000, bytes_in=4000) and counts.refusals() == {"size": 4000}
