"""The model that is served: its session, and what happens when that ends or its peer is gone.

    ready    requests are computed
    away     the peer did not answer: requests are refused at once, somebody looks every half second whether it is back
    ended    a verification failed, or the session cannot go on: nothing is computed until the operator starts again

From `away` back to `ready` by itself: the session goes on, as far as it is still open, and is opened anew where it had ended without
suspicion. From `ended` there is no way back: a peer that lies must not get one try after the other.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from cloven.errors import ClovenError, SecurityError, SessionClosed, WorkerTimeout, WorkerUnreachable
from cloven.metrics.session import SessionMetrics
from cloven.model.runtime import Session
from cloven.private_lora.query import CheckFailed
from cloven.serving.api_error import peer_away, session_ended
from cloven.telemetry import log_event, logger

READY, AWAY, ENDED = "ready", "away", "ended"
_LOOK_SECONDS = 0.5
_T = TypeVar("_T")


def one_pass_at_a_time(model: Any) -> None:
    """Passes of the model, from whichever threads, one after the other.

    transformers writes `config.is_causal` for the time of a batch's pass, and puts back what it found: a pass in another thread meanwhile
    attends to what is to come, and can leave the setting behind for ever. The texts are wrong without any error (a test shows it).
    """
    forward, lock = model.forward, threading.Lock()

    @functools.wraps(forward)
    def alone(*arguments: Any, **more: Any) -> Any:
        with lock:
            return forward(*arguments, **more)

    model.forward = alone


class ServedModel:
    """A loaded model with a session.

    Args:
        model, tokenizer: as `from_pretrained` gave them.
        name: what clients call it.
        attach: opens a session of the model.
        peer_is_there: whether a session could be opened now.
        batches: whether sequences of several requests may share a cache.

    Raises:
        ClovenError: of `attach`: the first session could not be opened.

    Guarantee: after a failed verification nothing is computed again. All of it from any thread.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, attach: Callable[[], Session], peer_is_there: Callable[[], bool], batches: bool
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._attach, self._peer_is_there, self.batches = attach, peer_is_there, batches
        self.sessions = SessionMetrics()
        self.session = self._opened()
        self._state = READY
        self._lock = threading.Lock()
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="cloven-peer", daemon=True)
        self._watcher.start()

    @property
    def state(self) -> str:
        """READY, AWAY or ENDED."""
        return self._state

    def require_ready(self) -> None:
        """Raises an ApiError (503) where nothing can be computed."""
        if self._state == ENDED:
            raise session_ended()
        if self._state == AWAY:
            raise peer_away()

    def guarded(self, work: Callable[[], _T]) -> _T:
        """Compute something with the model; what ends the session or shows that the peer is gone changes the state."""
        self.require_ready()
        try:
            return work()
        except Exception as error:
            self.noticed(error)
            raise

    def noticed(self, error: Exception) -> None:
        """Draw the conclusions from an error of a computation."""
        if isinstance(error, SecurityError | CheckFailed):
            self._end(error)
        elif isinstance(error, WorkerUnreachable | WorkerTimeout):
            self._leave(error)
        elif isinstance(error, SessionClosed):
            failure = self.session.failure
            if self._stopping.is_set():
                return
            if failure is None or isinstance(failure, SecurityError | CheckFailed):
                self._end(failure or error)
            else:
                self._leave(failure)

    def _end(self, error: ClovenError) -> None:
        with self._lock:
            if self._state != ENDED:
                message = "nothing is served any longer until this is looked at and started again: %s"
                log_event(logging.ERROR, "serving_ended", message, error, model=self.name)
            self._state = ENDED
        self.session.close(str(error))

    def _leave(self, error: ClovenError) -> None:
        with self._lock:
            if self._state != READY:
                return
            self._state = AWAY
        log_event(logging.WARNING, "peer_away", "requests are refused until the other half answers again: %s", error, model=self.name)
        self._wake.set()

    def _watch(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while not self._stopping.is_set() and self._state == AWAY and not self._returned():
                self._stopping.wait(_LOOK_SECONDS)
            if self._stopping.is_set():
                return

    def _opened(self) -> Session:
        session = self._attach()
        self.sessions.watch(self.name, session)
        return session

    def _returned(self) -> bool:
        try:
            if not self._peer_is_there():
                return False
            if self.session.closed:
                opened = self._opened()
                with self._lock:
                    if self._state == AWAY:
                        self.session = opened
                if self.session is not opened:  # meanwhile another thread has met a lie
                    opened.close()
        except (WorkerUnreachable, WorkerTimeout):
            return False
        except ClovenError as error:
            self._end(error)
            return True
        except Exception as error:
            logger.error("looking for the other half failed: %s", type(error).__name__)
            return False
        with self._lock:
            if self._state == AWAY:
                self._state = READY
                log_event(logging.WARNING, "peer_back", "the other half answers again", model=self.name)
        return True

    def close(self) -> None:
        """End the session."""
        self._stopping.set()
        self._wake.set()
        self._watcher.join(5)
        self.session.close()
