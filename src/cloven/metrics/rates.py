"""What `cloven top` shows of a process: rates from two scrapes, and what holds now."""

from __future__ import annotations

from dataclasses import dataclass

from cloven.metrics.catalog import ROLES
from cloven.metrics.scrape import Scrape

_PREFIX = "cloven_"


@dataclass(frozen=True)
class Activity:
    """One process; None where it has no such number, or a rate needs another scrape.

    Rates per second, bytes and seconds; `busy` is seconds of work per second, and more than 1 where several lanes are served.
    `pads`: rows ready and stored, `ledger`: rows left, each of what has least.
    """

    url: str
    status: str  # "up", or why it is away
    role: str = ""
    version: str = ""
    exchanges: float | None = None
    rows: float | None = None
    tokens: float | None = None
    bytes_in: float | None = None
    bytes_out: float | None = None
    busy: float | None = None
    waiting_seconds: float | None = None
    cpu: float | None = None
    refused: float | None = None
    failures: float | None = None
    queue: float | None = None
    connections: float | None = None
    pads: float | None = None
    ledger: float | None = None
    memory: float | None = None

    @property
    def up(self) -> bool:
        """Whether it answered."""
        return self.status == "up"


def away(url: str, why: str) -> Activity:
    """A process that did not answer."""
    return Activity(url, f"away: {why}")


def activity(url: str, before: Scrape | None, now: Scrape) -> Activity:
    """What a process does.

    Args:
        before: an earlier scrape; None: there are no rates yet. A process that was restarted in between counts from nothing again.
    """

    def rate(*names: str) -> float | None:
        current = now.total(*(_PREFIX + name for name in names))
        earlier = before.total(*(_PREFIX + name for name in names)) if before is not None else None
        return _rate(earlier, current, before, now)

    def process(name: str) -> float | None:
        return _rate(before.total(name) if before is not None else None, now.total(name), before, now)

    role, version = (now.label("cloven_process_info", label) for label in ("role", "version"))
    pads = [left for left in (now.least("cloven_session_pads_ready"), now.least("cloven_session_pads_stored")) if left is not None]
    return Activity(
        url,
        "up",
        role if role in ROLES else "",  # it is printed: whoever answers does not choose the words
        version if version.isascii() and version.replace(".", "").isalnum() and len(version) < 20 else "",
        exchanges=rate("exchanges_total", "session_exchanges_total"),
        rows=rate("rows_total", "session_rows_total"),
        tokens=rate("tokens_total"),
        bytes_in=rate("received_bytes_total", "session_received_bytes_total"),
        bytes_out=rate("sent_bytes_total", "session_sent_bytes_total"),
        busy=rate("work_seconds_total"),
        waiting_seconds=rate("wait_seconds_total", "session_wait_seconds_total"),
        cpu=process("process_cpu_seconds_total"),
        refused=_sum(now.total("cloven_refused_total"), now.total("cloven_connections_refused_total")),
        failures=now.total("cloven_session_verification_failures_total"),
        queue=now.total("cloven_waiting_requests"),
        connections=now.total("cloven_connections"),
        pads=sum(pads) if pads else None,
        ledger=now.least("cloven_ledger_left_rows", "cloven_ledger_client_left_rows"),
        memory=now.total("process_resident_memory_bytes"),
    )


def _rate(earlier: float | None, current: float | None, before: Scrape | None, now: Scrape) -> float | None:
    if before is None or earlier is None or current is None or now.at <= before.at:
        return None
    grown = current - earlier if current >= earlier else current
    return grown / (now.at - before.at)


def _sum(*values: float | None) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None
