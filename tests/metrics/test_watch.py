from __future__ import annotations

import socket
import time

import pytest

from cloven.metrics import scrape as scrape_module
from cloven.metrics.catalog import Sample
from cloven.metrics.endpoint import MetricsEndpoint
from cloven.metrics.watch import Watch
from tests.helpers import free_port


def test_rates_from_the_second_look_on_and_after_an_absence_again() -> None:
    port, count = free_port(), [0.0]

    def samples() -> list[Sample]:
        count[0] += 10
        return [Sample("cloven_exchanges_total", count[0], ("lane",))]

    url = f"http://127.0.0.1:{port}/metrics"
    with Watch([url]) as watch:
        assert "nobody listens" in watch.look()[0].status
        with MetricsEndpoint("127.0.0.1", port, "worker", [samples]):
            (first,) = watch.look()
            assert first.up and first.exchanges is None
            time.sleep(0.1)
            (second,) = watch.look()
            assert second.exchanges is not None and 10 / 5 < second.exchanges <= 10 / 0.1
        assert not watch.look()[0].up
        with MetricsEndpoint("127.0.0.1", port, "worker", [samples]):
            assert watch.look()[0].exchanges is None  # over an absence there is no rate


def test_one_that_is_silent_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape_module, "SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, MetricsEndpoint("127.0.0.1", 0, "worker", [list]) as endpoint:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/metrics"] * 6 + [endpoint.address]
        started = time.monotonic()
        with Watch(urls) as watch:
            rows = watch.look()
        assert time.monotonic() - started < 5  # six times one second, one after another, would be more
    assert [row.status for row in rows] == ["away: no answer in time"] * 6 + ["up"] and [row.url for row in rows] == urls
