"""Several processes, looked at again and again, all at once: one that is slow does not keep the others waiting longer than its time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from cloven.metrics.rates import Activity, activity, away
from cloven.metrics.scrape import Away, Scrape, open_client, scrape

_MOST_AT_ONCE = 16


class Watch:
    """Scrapes processes and remembers the last scrape of each; a context manager.

    Args:
        urls: see `metrics_url`.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = list(urls)
        self._before: dict[str, Scrape] = {}
        self._client = open_client()
        self._threads = ThreadPoolExecutor(min(_MOST_AT_ONCE, max(1, len(self._urls))), "cloven-top")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        self._client.close()

    def look(self) -> list[Activity]:
        """What every process does, in their order: since the look before, where it answered then."""
        return list(self._threads.map(self._one, self._urls))

    def _one(self, url: str) -> Activity:
        try:
            now = scrape(self._client, url)
        except Away as error:
            self._before.pop(url, None)
            return away(url, str(error))
        found = activity(url, self._before.get(url), now)
        self._before[url] = now
        return found
