"""Reading the metrics of a process, which may be away, slow or hostile: an address is checked, a text is bounded in size and time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cloven.errors import BadInput, RunError
from cloven.metrics.catalog import BY_NAME

MOST_BYTES = 2**20
SECONDS = 3.0
_PROCESS = ("process_cpu_seconds_total", "process_resident_memory_bytes")
Labels = tuple[tuple[str, str], ...]


class Away(RunError):
    """Nobody who publishes metrics answers at the address; the message says why."""


@dataclass(frozen=True)
class Scrape:
    """What a process said; `at` is the reader's monotonic clock, in seconds."""

    at: float
    values: dict[tuple[str, Labels], float]

    def total(self, *names: str) -> float | None:
        """The sum over all labels of these names; None where none of them is there."""
        found = [value for (name, _), value in self.values.items() if name in names]
        return sum(found) if found else None

    def least(self, *names: str) -> float | None:
        """The smallest value of these names; None where none of them is there."""
        return min((value for (name, _), value in self.values.items() if name in names), default=None)

    def label(self, name: str, label: str) -> str:
        """A label's value of the first sample of a name; "" where there is none."""
        return next((dict(labels).get(label, "") for (found, labels) in self.values if found == name), "")


def metrics_url(given: str) -> str:
    """The address of a process's metrics: http://HOST:PORT, with or without /metrics; https behind a proxy.

    Raises:
        BadInput: anything else.
    """
    text = given if "://" in given else f"http://{given}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadInput(f"{given!r} is no address of metrics ({error}): give http://HOST:PORT") from error
    if parts.scheme not in ("http", "https") or not host or not text.isprintable() or " " in text:
        raise BadInput(f"{given!r} is no address of metrics: give http://HOST:PORT")
    if parts.username is not None or parts.query or parts.fragment:
        raise BadInput(f"the address of metrics at {host}: give http://HOST:PORT alone, without a name, a password or a query")
    if port is None and parts.scheme == "http":
        raise BadInput(f"{given!r}: give the port too, that of --metrics-port")
    return f"{parts.scheme}://{parts.netloc}{parts.path if parts.path.strip('/') else '/metrics'}"


def scrape(client: httpx.Client, url: str) -> Scrape:
    """Read the metrics of a process.

    Args:
        client: see `open_client`.

    Raises:
        Away: nobody answers in time, or what comes is too long, or no metrics.
    """
    try:
        with client.stream("GET", url) as response:
            if response.status_code != httpx.codes.OK:
                raise Away(f"it answers {response.status_code}")
            text = _bounded(response)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Away(_reason(error)) from error
    return Scrape(time.monotonic(), _parsed(text))


def open_client() -> httpx.Client:
    """Connections that follow no redirects and read no settings of the environment, such as proxies."""
    return httpx.Client(timeout=SECONDS, follow_redirects=False, trust_env=False, headers={"Accept-Encoding": "identity"})


def _bounded(response: httpx.Response) -> str:
    deadline, text = time.monotonic() + SECONDS, bytearray()
    for piece in response.iter_raw():  # never decompressed: a small answer stays small
        text += piece
        if len(text) > MOST_BYTES:
            raise Away("its answer is too long")
        if time.monotonic() > deadline:
            raise Away("its answer is too slow")
    return text.decode("utf-8", "replace")


def _parsed(text: str) -> dict[tuple[str, Labels], float]:
    values: dict[tuple[str, Labels], float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if (sample.name in BY_NAME or sample.name in _PROCESS) and math.isfinite(sample.value):
                    values[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Away("its answer is no text of metrics") from error
    if not any(name.startswith("cloven_") for name, _ in values):
        raise Away("its answer has no metrics of cloven")
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        return "nobody listens there"
    return f"no answer ({type(error).__name__})"
