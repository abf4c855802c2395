from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from cloven.errors import (
    ClovenError,
    ForeignBundle,
    StoreUnusable,
    VerificationFailed,
    WorkerRefused,
    WorkerTimeout,
    WorkerUnreachable,
)
from cloven.private_lora.query import CheckFailed
from cloven.serving import model as model_module
from cloven.serving.api_error import ApiError
from cloven.serving.model import AWAY, ENDED, READY, ServedModel
from tests.served import Peer


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ServedModel, Peer]]:
    monkeypatch.setattr(model_module, "_LOOK_SECONDS", 0.01)
    peer = Peer(torch.nn.Linear(1, 1))
    made = ServedModel(peer.model, None, "bard", peer.attach, peer.is_there, True)
    yield made, peer
    made.close()
    assert not made._watcher.is_alive() and made.session.closed


def failing(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def until(served: ServedModel, state: str) -> None:
    started = time.monotonic()
    while served.state != state:
        assert time.monotonic() - started < 5
        time.sleep(0.005)


def refusal(served: ServedModel) -> str:
    with pytest.raises(ApiError) as caught:
        served.guarded(lambda: None)
    return caught.value.code


def test_work_is_done(served: tuple[ServedModel, Peer]) -> None:
    assert served[0].guarded(lambda: 5) == 5 and served[0].state == READY


@pytest.mark.parametrize("error", [WorkerUnreachable("gone"), WorkerTimeout("silent")])
def test_away_and_back(served: tuple[ServedModel, Peer], error: ClovenError) -> None:
    """While nobody answers nothing is tried; then the session, which is still open, goes on."""
    made, peer = served
    peer.there = False
    with pytest.raises(type(error)):
        made.guarded(failing(error))
    assert made.state == AWAY and refusal(made) == "peer_away"
    time.sleep(0.1)
    assert made.state == AWAY
    peer.there = True
    until(made, READY)
    assert made.guarded(lambda: 1) == 1 and peer.attached == 1
    peer.there = False
    with pytest.raises(type(error)):
        made.guarded(failing(error))
    peer.there = True
    until(made, READY)  # and again


@pytest.mark.parametrize("error", [VerificationFailed("lie"), ForeignBundle("another"), CheckFailed("one of ours")])
def test_suspicion_is_the_end(served: tuple[ServedModel, Peer], error: ClovenError, caplog: pytest.LogCaptureFixture) -> None:
    made, peer = served
    with caplog.at_level(logging.ERROR, "cloven"), pytest.raises(type(error)):
        made.guarded(failing(error))
    assert made.state == ENDED and made.session.closed and refusal(made) == "session_ended"
    assert "nothing is served any longer" in caplog.text
    made.noticed(WorkerUnreachable("and now it is gone"))
    time.sleep(0.1)
    assert made.state == ENDED and peer.attached == 1


def test_a_session_that_a_lie_ended_elsewhere(served: tuple[ServedModel, Peer]) -> None:
    """The thread that makes pads met it; the request only sees that the session has ended."""
    made, peer = served
    made.session.fail(VerificationFailed("a pad is wrong"))
    with pytest.raises(ClovenError):
        made.guarded(lambda: made.session.guarded(lambda: None))
    assert made.state == ENDED and peer.attached == 1


def test_a_session_that_ended_for_no_known_reason(served: tuple[ServedModel, Peer]) -> None:
    made, peer = served
    made.session.close()
    with pytest.raises(ClovenError):
        made.guarded(lambda: made.session.guarded(lambda: None))
    assert made.state == ENDED and peer.attached == 1


def test_a_session_that_ended_without_suspicion_is_opened_again(served: tuple[ServedModel, Peer]) -> None:
    made, peer = served
    first = made.session
    first.fail(StoreUnusable("locked for a moment"))
    with pytest.raises(ClovenError):
        made.guarded(lambda: made.session.guarded(lambda: None))
    until(made, READY)
    assert peer.attached == 2 and made.session is not first and not made.session.closed


@pytest.mark.parametrize(
    ("refused", "state"), [(WorkerTimeout("not yet"), AWAY), (ForeignBundle("another"), ENDED), (OSError("disk"), AWAY)]
)
def test_a_session_that_cannot_be_opened_again(served: tuple[ServedModel, Peer], refused: Exception, state: str) -> None:
    made, peer = served
    peer.refusal = refused
    made.session.fail(StoreUnusable("locked for a moment"))
    with pytest.raises(ClovenError):
        made.guarded(lambda: made.session.guarded(lambda: None))
    time.sleep(0.1)
    assert made.state == state and peer.attached == 1


def test_other_errors_are_one_requests_own(served: tuple[ServedModel, Peer]) -> None:
    made, _ = served
    for error in (WorkerRefused("no"), RuntimeError("bug")):
        with pytest.raises(type(error)):
            made.guarded(failing(error))
        assert made.state == READY


def test_closing_is_no_suspicion() -> None:
    peer = Peer(torch.nn.Linear(1, 1))
    made = ServedModel(peer.model, None, "bard", peer.attach, peer.is_there, True)
    made.close()
    with pytest.raises(ClovenError):
        made.guarded(lambda: made.session.guarded(lambda: None))
    assert made.state == READY


def test_the_first_session_must_open() -> None:
    peer = Peer(torch.nn.Linear(1, 1))
    peer.refusal = WorkerUnreachable("nobody")
    with pytest.raises(WorkerUnreachable):
        ServedModel(peer.model, None, "bard", peer.attach, peer.is_there, True)
