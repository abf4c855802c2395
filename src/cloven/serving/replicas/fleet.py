"""The replicas that live: who gets a request, who is replaced, and when all of them stop.

    lives    it answers; requests go to it
    silent   it has not answered lately: no new sessions go to it, and after half a minute it is replaced
    gone     its process has ended: its requests fail (503), its sessions go elsewhere, another one is started

A replica whose session ended because a verification failed ends service as a whole: a worker that lies gets one try, not one for every
replica, and not one more for every replica that is started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx

from cloven.errors import ClovenError
from cloven.serving.api_error import ApiError, peer_away, replica_lost, session_ended, stopping, too_many
from cloven.serving.model import AWAY, ENDED, READY
from cloven.serving.replicas.actor import STATE
from cloven.serving.replicas.launching import Launcher, Started
from cloven.serving.replicas.sticky import Places
from cloven.serving.replicas.totals import Totals
from cloven.serving.turns import Turns
from cloven.telemetry import logger

_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 5.0
_SILENT_SECONDS = 30.0  # until a replica that does not answer is replaced
_LATE_SECONDS = 1.0
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # before the next try to start one
_CONNECT_SECONDS, _IDLE_SECONDS = 10.0, 600.0
_T = TypeVar("_T")


class Replica:
    """One replica, while it lives; in the event loop's thread.

    `lost` is done when it is there no longer, with the error that its requests get; `state` is a served model's, half a second ago.
    """

    def __init__(self, number: int, started: Started, waiting: int) -> None:
        self.number, self.started = number, started
        self.turns = Turns(started.running, waiting)
        self.busy = 0
        self.state, self.answers = READY, True
        self.lost: asyncio.Future[Callable[[], ApiError]] = asyncio.get_running_loop().create_future()
        self.client = httpx.AsyncClient(
            base_url=started.url,
            verify=started.tls if started.tls is not None else True,
            trust_env=False,  # no proxy stands between
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=_IDLE_SECONDS),
        )

    async def unless_lost(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` comes to.

        Raises:
            ApiError: 503, the replica has ended meanwhile, or its connection.
        """
        if self.lost.done():
            work.close()
            raise self.lost.result()()
        task = asyncio.ensure_future(work)
        try:
            either: tuple[asyncio.Future[Any], ...] = (task, self.lost)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self.lost.result()()
            return task.result()
        except httpx.TransportError:
            self.answers = False  # until it does again
            raise replica_lost() from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


class Fleet:
    """All replicas; for one event loop.

    Args:
        launcher: starts and ends them.
        first: those that were started already, which is how many there shall be.
        max_queue: requests that may wait, for all replicas together.
    """

    def __init__(self, launcher: Launcher, first: Sequence[Started], max_queue: int) -> None:
        self._launcher, self._first, self._max_queue = launcher, list(first), max_queue
        self.wanted = len(first)
        self.live: list[Replica] = []
        self.totals = Totals()
        self._places: Places[Replica] = Places()
        self._numbers = 0
        self._keepers: list[asyncio.Task[None]] = []
        self._ended = self._stopping = False

    @property
    def state(self) -> str:
        """READY where any replica is, else AWAY; ENDED for good once a verification has failed."""
        if self._ended:
            return ENDED
        return READY if any(replica.state == READY and replica.answers for replica in self.live) else AWAY

    def require_serving(self) -> None:
        """Raises an ApiError (503) where nobody can compute."""
        if self._stopping:
            raise stopping()
        if self._ended:
            raise session_ended()
        if not self.live:
            raise replica_lost()
        if all(replica.state == AWAY for replica in self.live):
            raise peer_away()

    async def turn(self, session: bytes | None) -> Replica:
        """Wait for a turn of the session's replica; `give_back` ends it.

        Raises:
            ApiError: nobody serves (503), or too many wait (429).
        """
        while True:
            self.require_serving()
            replica = self._choose(session)
            waiting = sum(one.turns.waiting for one in self.live)
            if not replica.turns.free and waiting >= self._max_queue:
                raise too_many(waiting)
            replica.busy += 1
            try:
                await replica.turns.take()
            except BaseException as error:
                replica.busy -= 1
                if not (isinstance(error, ApiError) and error.code == "replica_lost"):
                    raise  # who has only waited is sent elsewhere
                continue
            if replica in self.live and (replica.answers or not any(one.answers for one in self.live)):
                return replica
            self.give_back(replica)  # it has broken down meanwhile

    def give_back(self, replica: Replica) -> None:
        """The turn is over."""
        replica.busy -= 1
        replica.turns.give_back()

    def _choose(self, session: bytes | None) -> Replica:
        """The session's own; else the one with the least to do, of those that answer where there are any."""
        own = self._places.get(session) if session is not None else None
        if own is None or not own.answers:
            own = min(self.live, key=lambda replica: (not replica.answers, replica.state != READY, replica.busy, replica.number))
            if session is not None:
                self._places.put(session, own)
        return own

    async def failed(self, replica: Replica) -> None:
        """A verification has failed there: nothing is computed any longer, and what the replica says of it is in the log."""
        self._end()
        await self._look(replica)

    def _end(self) -> None:
        if not self._ended:
            logger.error("a replica's session has ended: no replica serves any longer until this is looked at and started again")
        self._ended = True

    def begin(self) -> None:
        """Look after the replicas from now on."""
        self._keepers = [asyncio.create_task(self._keep(started)) for started in self._first]

    def refuse(self) -> None:
        """Nobody gets a turn any longer."""
        self._stopping = True
        for replica in self.live:
            replica.turns.stop()

    def end_answers(self) -> None:
        """Who is being answered is told that the server is stopping."""
        for replica in self.live:
            if not replica.lost.done():
                replica.lost.set_result(stopping)

    async def stop(self) -> None:
        """End all replicas, those too that are being started."""
        self.refuse()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, started: Started | None) -> None:
        """One replica after the other, each until it is gone."""
        wait = _FIRST_WAIT
        while not self._stopping:
            if started is None:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
                started = await self._start() if not self._ended else None
                continue
            born = time.monotonic()
            try:
                await self._look_after(started)
            finally:
                await _to_the_end(self._launcher.stop, started)
            started = None
            if time.monotonic() - born > _LONGEST_WAIT:
                wait = _FIRST_WAIT

    async def _start(self) -> Started | None:
        starting = asyncio.ensure_future(asyncio.to_thread(self._launcher.start))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:  # a thread cannot be cancelled: what it starts is ended
            with contextlib.suppress(ClovenError):
                await _to_the_end(self._launcher.stop, await starting)
            raise
        except ClovenError as error:
            logger.error("a replica cannot be started: %s", error)
        except Exception as error:
            logger.error("a replica cannot be started: %s", type(error).__name__)
        return None

    async def _look_after(self, started: Started) -> None:
        """Until it is gone, or has been silent for too long."""
        self._numbers += 1
        replica = Replica(self._numbers, started, self._max_queue)
        self.live.append(replica)
        if self._numbers > self.wanted:
            logger.warning("replica %d serves in its place", replica.number)
        ended = asyncio.wrap_future(started.ended)
        try:
            silent = 0.0  # seconds; a front that was late itself knows nothing of its replicas
            while not ended.done() and silent < _SILENT_SECONDS:
                began = time.monotonic()
                silent = 0.0 if await self._look(replica) else silent + min(time.monotonic() - began, _ANSWER_SECONDS) + _LOOK_SECONDS
                began = time.monotonic()
                await asyncio.wait({ended}, timeout=_LOOK_SECONDS)
                if time.monotonic() - began > _LOOK_SECONDS + _LATE_SECONDS:
                    silent = 0.0
            logger.error("replica %d %s: its requests have failed", replica.number, "has ended" if ended.done() else "does not answer")
        finally:
            self.live.remove(replica)
            self.totals.gone(replica.number)
            self._places.forget(replica)
            ended.add_done_callback(lambda future: future.cancelled() or future.exception())  # which says only that it has ended
            why = stopping if self._stopping else replica_lost
            replica.turns.stop(why)
            if not replica.lost.done():
                replica.lost.set_result(why)
            await replica.client.aclose()

    async def _look(self, replica: Replica) -> bool:
        """Fetch its state and its log; whether it has answered."""
        try:
            answer = await replica.client.get(STATE, timeout=_ANSWER_SECONDS)
            told = answer.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            replica.answers = replica.answers and isinstance(error, httpx.TimeoutException)  # busy, as far as anybody knows
            return False
        replica.state, replica.answers = told["state"], True
        self.totals.heard(replica.number, told["samples"])
        for level, line in told["log"]:
            logger.log(level if level in _LEVELS else logging.WARNING, "replica %d: %s", replica.number, line)
        if replica.state == ENDED:
            self._end()
        return True


_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)


async def _to_the_end(work: Callable[[Started], None], started: Started) -> None:
    """In a thread, whoever is cancelled meanwhile."""
    task = asyncio.ensure_future(asyncio.to_thread(work, started))
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
