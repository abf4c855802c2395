from __future__ import annotations

import logging

import pytest

from cloven.errors import (
    BudgetExhausted,
    ForeignBundle,
    PadMisuse,
    SessionClosed,
    StoreEmpty,
    VerificationFailed,
    WorkerRefused,
    WorkerTimeout,
    WorkerUnreachable,
)
from cloven.serving.api_error import ApiError, bad_request, log_failure, of_exception, peer_away, session_ended, stopping, too_many

SECRET = "ipc:///run/secret/place: model.layers.3"


def test_the_form() -> None:
    error = bad_request("n: one", "unsupported_value", "n")
    assert error.body() == {"error": {"message": "n: one", "type": "invalid_request_error", "param": "n", "code": "unsupported_value"}}
    assert error.status == 400 and error.headers() == {}


def test_who_is_to_try_again_is_told_when() -> None:
    for error, status in ((too_many(5), 429), (peer_away(), 503)):
        assert error.status == status and int(error.headers()["retry-after"]) >= 1
    for error in (session_ended(), stopping()):
        assert error.status == 503 and error.headers() == {}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (WorkerUnreachable(SECRET), 503, "peer_away"),
        (WorkerTimeout(SECRET), 503, "peer_away"),
        (VerificationFailed(SECRET), 502, "verification_failed"),
        (ForeignBundle(SECRET), 502, "verification_failed"),
        (PadMisuse(SECRET), 502, "verification_failed"),
        (BudgetExhausted(SECRET), 429, "insufficient_quota"),
        (StoreEmpty(SECRET), 503, "pads_used_up"),
        (SessionClosed(SECRET), 503, "session_ended"),
        (WorkerRefused(SECRET), 502, "peer_failed"),
        (RuntimeError(SECRET), 500, "internal_error"),
        (KeyError("the prompt"), 500, "internal_error"),
    ],
)
def test_errors_of_a_generation(error: Exception, status: int, code: str) -> None:
    """Neither address nor layer, nor what an unknown error quotes."""
    told = of_exception(error)
    assert (told.status, told.code) == (status, code)
    assert "secret" not in told.message and "layers" not in told.message and "prompt" not in told.message


def test_an_answer_is_its_own() -> None:
    error = ApiError(418, "tea", "teapot")
    assert of_exception(error) is error


def test_a_failure_in_the_log_names_places_and_no_contents(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("Xylophone")
    except ValueError as error:
        with caplog.at_level(logging.DEBUG, "cloven"):
            log_failure(error)
            log_failure(bad_request("Xylophone: no"))
            log_failure(WorkerRefused("layer 3: no"))
    assert "ValueError at test_api_error.py:" in caplog.text and "layer 3: no" in caplog.text and "Xylophone" not in caplog.text
