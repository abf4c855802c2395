"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}} and a status.

What a client is told names neither addresses nor layers: those are the operator's, and in the log.
"""

from __future__ import annotations

import traceback
from typing import Any

from cloven.errors import (
    BudgetExhausted,
    ClovenError,
    SecurityError,
    SessionClosed,
    StoreEmpty,
    WorkerTimeout,
    WorkerUnreachable,
)
from cloven.telemetry import logger


class ApiError(Exception):
    """An answer with an error; `retry_after` in seconds."""

    def __init__(
        self, status: int, message: str, code: str, kind: str = "invalid_request_error", param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.kind, self.param, self.retry_after = status, message, code, kind, param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What goes with it."""
        return {"retry-after": str(self.retry_after)} if self.retry_after else {}


def bad_request(message: str, code: str = "invalid_value", param: str | None = None) -> ApiError:
    """400: the request is wrong."""
    return ApiError(400, message, code, param=param)


def too_many(waiting: int) -> ApiError:
    """429: the queue is full."""
    message = f"{waiting} requests are waiting already: try again in a moment"
    return ApiError(429, message, "queue_full", "rate_limit_error", retry_after=1)


def peer_away() -> ApiError:
    """503: nobody is there to compute with."""
    message = "the model's other half does not answer at the moment: try again; its operator's log says more"
    return ApiError(503, message, "peer_away", "server_error", retry_after=1)


def replica_lost() -> ApiError:
    """503: the process that computed this request has ended."""
    message = "the replica that had this request has ended: try again; another one answers"
    return ApiError(503, message, "replica_lost", "server_error", retry_after=1)


def session_ended() -> ApiError:
    """503: nothing is served until the operator has decided."""
    message = "serving has stopped after an answer failed verification: the operator has to look at it and to start it again"
    return ApiError(503, message, "session_ended", "server_error")


def unreadable_tool_call() -> ApiError:
    """502: the model's text is no answer."""
    message = "the model wrote a tool call that cannot be read: ask again, or otherwise; too few max_tokens cut it off"
    return ApiError(502, message, "unreadable_tool_call", "server_error")


def stopping() -> ApiError:
    """503: the server is being stopped."""
    return ApiError(503, "the server is stopping", "stopping", "server_error")


def of_exception(error: BaseException) -> ApiError:
    """What a client is told of an error that ended its generation."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, WorkerUnreachable | WorkerTimeout):
        return peer_away()
    if isinstance(error, SecurityError):
        message = "an answer failed verification: nothing of it was used, and serving has stopped until the operator has looked at it"
        return ApiError(502, message, "verification_failed", "server_error")
    if isinstance(error, BudgetExhausted):
        return ApiError(429, "the adapter's budget of answers is used up", "insufficient_quota", "insufficient_quota")
    if isinstance(error, StoreEmpty):
        return ApiError(503, "the store of pads has run dry", "pads_used_up", "server_error")
    if isinstance(error, SessionClosed):
        return session_ended()
    if isinstance(error, ClovenError):
        message = "the model's other half did not answer this request as it should: try again; its operator's log says more"
        return ApiError(502, message, "peer_failed", "server_error")
    return ApiError(500, "this request failed in the server, whose log says where", "internal_error", "server_error")


def log_failure(error: Exception) -> None:
    """One line, without what an unknown exception says: it might quote the prompt."""
    if isinstance(error, ApiError):
        return
    if isinstance(error, ClovenError):
        logger.warning("a request failed: %s", error)
        return
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    logger.error("a request failed: %s at %s", type(error).__name__, where)
