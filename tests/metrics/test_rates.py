from __future__ import annotations

from cloven.metrics.rates import activity, away
from cloven.metrics.scrape import Scrape


def scrape(at: float, role: str = "worker", version: str = "0.1.0", **values: float) -> Scrape:
    found = {(name if name.startswith("process_") else f"cloven_{name}", (("way", "lane"),)): value for name, value in values.items()}
    found["cloven_process_info", (("role", role), ("version", version))] = 1.0
    return Scrape(at, found)


def test_rates_are_over_the_time_between_two_scrapes() -> None:
    before = scrape(10.0, exchanges_total=100, rows_total=5, work_seconds_total=1.0, process_cpu_seconds_total=3.0, tokens_total=7)
    now = scrape(12.0, exchanges_total=150, rows_total=5, work_seconds_total=2.0, process_cpu_seconds_total=6.0, tokens_total=8)
    found = activity("u", before, now)
    assert (found.exchanges, found.rows, found.busy, found.cpu, found.tokens) == (25.0, 0.0, 0.5, 1.5, 0.5)
    assert found.up and (found.role, found.version) == ("worker", "0.1.0")


def test_without_an_earlier_scrape_there_are_no_rates() -> None:
    found = activity("u", None, scrape(1.0, exchanges_total=100, waiting_requests=2, process_resident_memory_bytes=5))
    assert found.exchanges is None and found.cpu is None
    assert (found.queue, found.memory) == (2, 5)


def test_the_same_moment_gives_no_rate() -> None:
    assert activity("u", scrape(1.0, exchanges_total=1), scrape(1.0, exchanges_total=2)).exchanges is None


def test_a_process_that_was_restarted_counts_from_nothing() -> None:
    assert activity("u", scrape(1.0, exchanges_total=1000), scrape(2.0, exchanges_total=30)).exchanges == 30.0


def test_a_count_that_is_new_has_no_rate_yet() -> None:
    assert activity("u", scrape(1.0), scrape(2.0, exchanges_total=30)).exchanges is None


def test_the_trusted_side() -> None:
    names = ("exchanges", "sent_bytes", "received_bytes", "wait_seconds")
    before = scrape(0.0, "serve", **{f"session_{name}_total": 0.0 for name in names})
    now = scrape(
        1.0,
        "serve",
        **{f"session_{name}_total": float(i + 1) for i, name in enumerate(names)},
        session_pads_ready=3,
        session_pads_stored=40,
        session_verification_failures_total=2,
    )
    found = activity("u", before, now)
    assert (found.exchanges, found.bytes_out, found.bytes_in, found.waiting_seconds) == (1, 2, 3, 4)
    assert (found.pads, found.failures, found.ledger, found.busy) == (43, 2, None, None)


def test_the_adapter_server() -> None:
    now = scrape(1.0, "adapter-server", ledger_left_rows=50, ledger_client_left_rows=20, refused_total=1, connections_refused_total=2)
    found = activity("u", None, now)
    assert (found.ledger, found.refused, found.pads) == (20, 3, None)


def test_whoever_answers_does_not_choose_the_words() -> None:
    found = activity("u", None, scrape(1.0, "\x1b[2J[red]", "9" * 50))
    assert (found.role, found.version) == ("", "")
    assert activity("u", None, scrape(1.0, version="\x1b")).version == ""


def test_away() -> None:
    found = away("u", "nobody listens there")
    assert not found.up and found.status == "away: nobody listens there" and found.exchanges is None
