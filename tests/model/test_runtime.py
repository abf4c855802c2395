from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import zmq
from torch import nn

from cloven.errors import BadInput, PadMisuse, RunError, SessionClosed, VerificationFailed
from cloven.model.runtime import RuntimeOptions, Session, open_channel, session_of
from cloven.telemetry import Telemetry
from cloven.wire.channel import Channel

BUNDLE = bytes(16)


@pytest.fixture
def session(context: zmq.Context[zmq.Socket[bytes]]) -> Any:
    """A session of an empty model, with a channel to nobody."""
    model = nn.Linear(1, 1)
    session = new_session(model, context)
    session.model = model  # type: ignore[attr-defined]  # keeps it alive
    yield session
    session.close()


def new_session(model: nn.Module, context: zmq.Context[zmq.Socket[bytes]]) -> Session:
    return Session(model, Channel("inproc://nobody", BUNDLE, context=context, timeout=0.2), Telemetry())


def test_options() -> None:
    options = RuntimeOptions("ipc:///x")
    assert options.timeout == 30 and options.look_ahead is None and not options.insecure_plain_tcp
    assert options.with_timeout(2.0) == RuntimeOptions("ipc:///x", timeout=2.0)
    assert RuntimeOptions("ipc:///x", Path("k")).keys == Path("k")


@pytest.mark.parametrize("seconds", [-0.001, float("nan"), float("inf"), 60.0])
def test_impossible_round_trips(seconds: float) -> None:
    with pytest.raises(BadInput, match="simulated round trip"):
        RuntimeOptions("ipc:///x", simulated_rtt=seconds)


def test_channels_have_the_round_trip_of_the_options(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    for rtt in (0.0, 0.25):
        channel = open_channel(RuntimeOptions("inproc://nobody", simulated_rtt=rtt), BUNDLE.hex(), Telemetry(), context=context)
        assert channel.simulated_rtt == rtt
        channel.close()


def test_actions_run_once_last_first(session: Session) -> None:
    order: list[int] = []
    for i in range(3):
        session.on_close(lambda i=i: order.append(i))  # type: ignore[misc]
    session.close()
    session.close("again")
    assert order == [2, 1, 0] and session.closed


def test_a_pad_that_is_missing_because_another_thread_ended_the_session_says_why(session: Session) -> None:
    def meanwhile_closed() -> None:
        session.close("a record of the store is damaged")  # by the thread that reads ahead
        raise PadMisuse("the pad store is closed")

    with pytest.raises(SessionClosed, match="has ended: a record of the store is damaged"):
        session.guarded(meanwhile_closed)


def test_a_misused_pad_ends_the_session(session: Session) -> None:
    def misused() -> None:
        raise PadMisuse("a pad masks once")

    with pytest.raises(PadMisuse, match="a pad masks once"):
        session.guarded(misused)
    assert session.closed


def test_guarded_passes_results_and_other_errors_through(session: Session) -> None:
    assert session.guarded(lambda: 7) == 7

    def fail() -> None:
        raise RunError("the network")

    with pytest.raises(RunError, match="the network"):
        session.guarded(fail)
    assert not session.closed  # a restarted worker goes on


def test_a_security_failure_ends_the_session_before_it_is_raised(session: Session) -> None:
    closed_when: list[bool] = []

    def fail() -> None:
        raise VerificationFailed("layer 3: wrong in 1 of 1 rows")

    session.on_close(lambda: closed_when.append(session.closed))
    with pytest.raises(VerificationFailed, match="layer 3"):
        session.guarded(fail)
    assert closed_when == [True]
    with pytest.raises(SessionClosed, match=r"has ended: layer 3: wrong in 1 of 1 rows"):
        session.guarded(lambda: 7)


def test_what_ended_a_session_is_kept(session: Session) -> None:
    """The first error; none where it was closed by its owner."""
    assert session.failure is None
    first = VerificationFailed("layer 1")
    session.fail(first)
    session.fail(PadMisuse("layer 2"))
    assert session.closed and session.failure is first
    with pytest.raises(SessionClosed, match="layer 1"):
        session.guarded(lambda: None)


def test_a_guarded_failure_is_kept_and_a_close_is_none(session: Session) -> None:
    def lie() -> None:
        raise VerificationFailed("a lie")

    with pytest.raises(VerificationFailed) as caught:
        session.guarded(lie)
    assert session.failure is caught.value


def test_an_owners_end_is_no_failure(session: Session) -> None:
    session.close()
    session.fail(VerificationFailed("too late"))
    assert session.failure is None


def test_a_context_manager(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    model = nn.Linear(1, 1)
    with new_session(model, context) as session:
        assert session_of(model) is session and "open" in repr(session)
    assert session.closed and "closed" in repr(session)


def test_a_new_session_closes_the_old_one(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    model = nn.Linear(1, 1)
    first = new_session(model, context)
    with new_session(model, context) as second:
        assert first.closed and session_of(model) is second


def test_an_action_that_fails_does_not_keep_the_others_from_running(session: Session) -> None:
    """Secrets must go, whatever else goes wrong."""
    done: list[int] = []

    def fail() -> None:
        raise RuntimeError("in the way")

    session.on_close(lambda: done.append(1))
    session.on_close(fail)
    with pytest.raises(RuntimeError, match="in the way"):
        session.close()
    assert done == [1]


def test_models_do_not_live_on_for_their_sessions_sake(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    model = nn.Linear(1, 1)
    new_session(model, context).close()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_statistics_are_by_layer(session: Session) -> None:
    assert session.statistics() == {}
