from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from cloven.serving.model import AWAY, ENDED, READY, ServedModel, one_pass_at_a_time
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


def events_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a program that reads the log would act on."""
    return [event for record in caplog.records if (event := getattr(record, "event", None)) and record.levelno >= logging.WARNING]


@pytest.mark.parametrize("error", [WorkerUnreachable("gone"), WorkerTimeout("silent")])
def test_away_and_back(served: tuple[ServedModel, Peer], error: ClovenError, caplog: pytest.LogCaptureFixture) -> None:
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
    assert events_of(caplog) == 2 * ["peer_away", "peer_back"]


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
    assert events_of(caplog) == ["serving_ended"]


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


class Counting(torch.nn.Module):
    """How many are in it at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = self.most = 0

    def forward(self, input_ids: int, logits_to_keep: int = 0) -> int:
        """Slowly."""
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        self.inside -= 1
        if input_ids < 0:
            raise ValueError
        return input_ids + logits_to_keep


@pytest.mark.parametrize("alone", [True, False])
def test_passes_one_at_a_time(alone: bool) -> None:
    """From several threads, and after an error. Without it they overlap, and transformers' batches do not survive that."""
    model = Counting()
    if alone:
        one_pass_at_a_time(model)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(model, number, logits_to_keep=1) for number in (1, -1, 2, 3, 4, 5, 6, 7)]
        assert [job.exception() is None and job.result() for job in jobs] == [2, False, 3, 4, 5, 6, 7, 8]
    assert (model.most == 1) is alone
    assert list(inspect.signature(model.forward).parameters) == ["input_ids", "logits_to_keep"]  # generate looks


def test_the_first_session_must_open() -> None:
    peer = Peer(torch.nn.Linear(1, 1))
    peer.refusal = WorkerUnreachable("nobody")
    with pytest.raises(WorkerUnreachable):
        ServedModel(peer.model, None, "bard", peer.attach, peer.is_there, True)


def test_a_session_that_is_opened_while_another_thread_meets_a_lie(served: tuple[ServedModel, Peer]) -> None:
    """It is closed again: nobody computes with it."""
    made, peer = served
    opened: list[Any] = []
    attach = peer.attach

    def slowly() -> Any:
        made.noticed(VerificationFailed("a lie"))
        opened.append(attach())
        return opened[-1]

    made._attach = slowly
    made.session.fail(StoreUnusable("locked for a moment"))
    with pytest.raises(ClovenError):
        made.guarded(lambda: made.session.guarded(lambda: None))
    deadline = time.monotonic() + 10
    while not (opened and opened[0].closed) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made.state == ENDED and opened[0].closed and made.session is not opened[0]
