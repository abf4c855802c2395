"""The workers of a session: who holds which rows, one connection each, and who takes over when one is gone.

A seat is one part of the exposed half; one worker sits in it, others may be in reserve (replicas). Addresses:

    "A"              one worker holds everything
    "A,B"            one seat, B in reserve
    "A B,C"          two seats (with placement layers or rows), C in reserve for B; with placement replicas: one seat, the others in reserve

When a worker is gone, its seat goes to the next address; the exchange is done again there, with fresh pads and another secret S. A worker
that answers wrongly is another matter: the session ends (see `offload`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from cloven.bundle.manifest import ExposedGroup
from cloven.bundle.placement import WHOLE, Part, parts
from cloven.errors import BadInput, ClovenError, ForeignBundle, RunError, SecurityError, WorkerRefused, WorkerTimeout, WorkerUnreachable
from cloven.field.freivalds import Freivalds
from cloven.telemetry import logger
from cloven.wire.channel import Channel, Exchanger, Watcher

PLACEMENTS = ("replicas", "layers", "rows")
PATIENCE = 1.0  # seconds that a lost connection may take to come back where there is a replica

Connect = Callable[[str, float | None], Channel]  # address, patience
MakeCheck = Callable[[str, int, Part], Freivalds]  # worker, group, part


def seat_addresses(text: str, placement: str) -> list[list[str]]:
    """The addresses of every seat, the first one in use.

    Raises:
        BadInput: none, one twice, or an unknown placement.
    """
    seats = [[address for address in seat.split(",") if address] for seat in text.split()]
    everyone = [address for seat in seats for address in seat]
    if placement not in PLACEMENTS:
        raise BadInput(f"placement {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    if not everyone or not all(seats):
        raise BadInput("give the worker's address")
    if len(set(everyone)) < len(everyone):
        raise BadInput("a worker's address is given twice")
    return [everyone] if placement == "replicas" else seats


class Seat:
    """One part of the exposed half: a `Holder` of its rows, for every group."""

    def __init__(self, addresses: list[str], part: Part, bundle_groups: int, connect: Connect, make_check: MakeCheck) -> None:
        self._addresses, self.part, self._groups = addresses, part, bundle_groups
        self._connect, self._make_check = connect, make_check
        self._position = 0
        self._checks: dict[tuple[str, int], Freivalds] = {}
        self._moving = threading.RLock()  # several threads may use one session: one of them moves, the others wait
        self._closed = False
        self._channel = self._open(addresses[0])

    @property
    def address(self) -> str:
        """Of the worker in use."""
        return self._addresses[self._position]

    def channel(self) -> Channel:
        """The connection to the worker in use."""
        return self._channel

    def freivalds(self, group: int) -> Freivalds:
        """The check of the answers of the worker in use."""
        with self._moving:
            place = (self.address, group)
            if place not in self._checks:
                self._checks[place] = self._make_check(self.address, group, self.part)
            return self._checks[place]

    def current(self, group: int) -> tuple[Channel, Freivalds]:
        """See `Holder`."""
        with self._moving:
            return self._channel, self.freivalds(group)

    def move(self, gone: Exchanger, error: ClovenError) -> None:
        """Go on with the next worker that answers; they are tried in a circle, each once.

        Raises:
            WorkerUnreachable, WorkerTimeout, SessionClosed: the error that was given, where there is no other worker, or no session.
            BadInput, ForeignBundle, WorkerRefused: the only ones that answer hold something else.
        """
        with self._moving:
            if gone is not self._channel:
                return  # another thread was quicker
            if self._closed:
                raise error
            self._move(error)

    def _move(self, error: ClovenError) -> None:
        unfit: ClovenError | None = None
        for step in range(1, len(self._addresses)):
            position = (self._position + step) % len(self._addresses)
            address = self._addresses[position]
            try:
                channel = self._open(address)
            except (WorkerUnreachable, WorkerTimeout):
                continue
            except (BadInput, SecurityError, WorkerRefused) as other:  # it holds something else: perhaps the next one does not
                logger.warning("%s cannot take over: %s", address, other)
                unfit = other
                continue
            logger.warning("%s is gone: its part of the bundle moves to %s", self.address, address)
            channel.timeout, channel.simulated_rtt = self._channel.timeout, self._channel.simulated_rtt
            channel.watcher = self._channel.watcher
            self._channel.close()
            self._channel, self._position = channel, position
            return
        if unfit is not None:
            raise unfit from error
        if len(self._addresses) > 1:
            raise type(error)(f"{error}; no replica of it answers either") from error
        raise error

    def close(self) -> None:
        """Close the connection and drop the checks."""
        with self._moving:
            self._closed = True
            self._channel.close()
            self._checks.clear()

    def _open(self, address: str) -> Channel:
        channel = self._connect(address, PATIENCE if len(self._addresses) > 1 else None)
        try:
            groups = channel.hello()
            if groups != self._groups:
                raise ForeignBundle(f"{address}: the worker serves {groups} groups, the bundle has {self._groups}")
            if channel.part not in ("", str(self.part)):
                wanted = f"--part {self.part}" if self.part.kind else "no --part"
                raise BadInput(
                    f"{address}: the worker holds part {channel.part}; this placement needs one with {wanted}, or with everything"
                )
            if self.part.kind == "rows" and channel.part == "":
                raise BadInput(f"{address}: the worker holds everything; the placement by rows needs one with --part {self.part}")
        except BaseException:
            channel.close()
            raise
        return channel


class Workers:
    """All seats of a session; closes like one channel.

    Args:
        text: addresses, see the module; placement: "replicas", "layers" or "rows".
        groups: of the exposed manifest.
        connect, make_check: how to reach a worker, and how to check its answers.
    """

    def __init__(self, text: str, placement: str, groups: tuple[ExposedGroup, ...], connect: Connect, make_check: MakeCheck) -> None:
        addresses = seat_addresses(text, placement)
        whole = len(addresses) == 1
        self.parts = [WHOLE] if whole else parts(placement, len(addresses), groups)
        self._groups = groups
        self.seats: list[Seat] = []
        try:
            for seat, part in zip(addresses, self.parts, strict=True):
                self.seats.append(self._first_seat(seat, part, connect, make_check))
        except BaseException:
            self.close()
            raise

    def _first_seat(self, addresses: list[str], part: Part, connect: Connect, make_check: MakeCheck) -> Seat:
        """A seat whose first worker that answers is in use."""
        for skipped in range(len(addresses)):
            try:
                return Seat(addresses[skipped:] + addresses[:skipped], part, len(self._groups), connect, make_check)
            except (WorkerUnreachable, WorkerTimeout):
                if skipped == len(addresses) - 1:
                    raise
                logger.warning("%s does not answer: a replica takes its place", addresses[skipped])
        raise RunError("there are no workers")

    def shares(self, group: int) -> list[tuple[int, Seat]]:
        """Numbers of rows of a group and the seats that hold them, in the order of the rows."""
        held = [(len(seat.part.rows(group, self._groups)), seat) for seat in self.seats]
        return [(rows, seat) for rows, seat in held if rows]

    @property
    def address(self) -> str:
        """Of all workers in use."""
        return " ".join(seat.address for seat in self.seats)

    @property
    def simulated_rtt(self) -> float:
        """See `Channel`; of all connections."""
        return max(seat.channel().simulated_rtt for seat in self.seats)

    @simulated_rtt.setter
    def simulated_rtt(self, seconds: float) -> None:
        for seat in self.seats:
            seat.channel().simulated_rtt = seconds

    @property
    def timeout(self) -> float:
        """Seconds that an answer may take; of all connections."""
        return max(seat.channel().timeout for seat in self.seats)

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        for seat in self.seats:
            seat.channel().timeout = seconds

    @property
    def watcher(self) -> Watcher | None:
        """See `Channel`; of all connections."""
        return self.seats[0].channel().watcher

    @watcher.setter
    def watcher(self, watcher: Watcher | None) -> None:
        for seat in self.seats:
            seat.channel().watcher = watcher

    def close(self) -> None:
        """Close all connections."""
        for seat in self.seats:
            seat.close()
