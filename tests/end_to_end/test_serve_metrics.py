"""What `cloven serve` publishes of itself: counts that agree with what was asked, and logs without contents."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloven.cluster.worker_process import WorkerProcess
from tests.end_to_end.endpoint import endpoint
from tests.helpers import free_port
from tests.split_models import demo_bundle, run_cloven

PROMPT = "ROMEO: Zanzibar quixotic hippogriff"


def scraped(url: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    text = httpx.get(url, timeout=10).text
    assert PROMPT not in text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counts_agree_with_what_was_asked(demo_worker: WorkerProcess) -> None:
    port = free_port()
    arguments = ("--worker", demo_worker.address, "--model-name", "bard", "--metrics-port", str(port), "--log-format", "json")
    with endpoint(demo_bundle("int8x2").trusted, *arguments, "--log-level", "DEBUG") as (process, client):
        url = f"http://127.0.0.1:{port}/metrics"
        before = scraped(url)
        assert before["cloven_tokens_total",] == 0 and before["cloven_session_open", "bard"] == 1
        answers = [client.completions.create(model="bard", prompt=PROMPT, max_tokens=count, temperature=0) for count in (5, 8)]
        tokens = sum(answer.usage.completion_tokens for answer in answers if answer.usage is not None)
        after = scraped(url)
        assert after["cloven_tokens_total",] == tokens == 13
        assert after["cloven_answers_total", "200"] - before.get(("cloven_answers_total", "200"), 0) == 2
        assert after["cloven_waiting_requests",] == after["cloven_computed_requests",] == 0
        groups = len(demo_bundle("int8x2").manifest.exposed.groups)
        exchanges = after["cloven_session_exchanges_total", "bard"] - before["cloven_session_exchanges_total", "bard"]
        assert exchanges >= groups * tokens
        table = run_cloven("top", "--once", f"http://127.0.0.1:{port}/metrics")
        assert table.returncode == 0 and "serve" in table.stdout, table.stderr
        log = process.log()
        assert all(isinstance(json.loads(line), dict) for line in log.splitlines() if line.startswith("{"))
        assert PROMPT not in log and "hippogriff" not in log


@pytest.mark.long
def test_a_port_that_is_taken_is_named(demo_worker: WorkerProcess) -> None:
    half = str(demo_bundle("int8x2").trusted)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = run_cloven("serve", half, "--worker", demo_worker.address, "--port", "0", "--metrics-port", str(port))
    assert failed.returncode == 1 and f"metrics: cannot listen at 127.0.0.1:{port}" in failed.stderr
