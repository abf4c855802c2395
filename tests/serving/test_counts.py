from __future__ import annotations

from prometheus_client import generate_latest

from cloven.metrics.catalog import BY_NAME
from cloven.metrics.collector import registry_of
from cloven.serving.counts import EndpointCounts
from tests.served import NAME, endpoint, run


def values(counts: EndpointCounts) -> dict[tuple[str, ...], float]:
    found = list(counts.samples())
    assert {sample.name for sample in found} <= set(BY_NAME)
    return {(sample.name.removeprefix("cloven_"), *sample.labels): sample.value for sample in found}


def test_tokens_stay_counted_and_never_fall() -> None:
    waiting, lengths = [3], [5, 7]
    counts = EndpointCounts(lambda: waiting[0])
    first, second = object(), object()
    counts.begun(first, lambda: lengths[0])
    counts.begun(second, lambda: lengths[1])
    assert values(counts) == {("tokens_total",): 12, ("waiting_requests",): 3, ("computed_requests",): 2}
    counts.ended(first)
    lengths[0] = 1000  # whatever becomes of it now
    counts.ended(first)  # a second time is none
    assert values(counts)["tokens_total",] == 12 and values(counts)["computed_requests",] == 1
    lengths[1], waiting[0] = 9, 0
    counts.ended(second)
    counts.ended(object())
    assert values(counts) == {("tokens_total",): 14, ("waiting_requests",): 0, ("computed_requests",): 0}


def test_answers_by_status() -> None:
    counts = EndpointCounts(lambda: 0)
    for status in (200, 429, 200):
        counts.answered(status)
    assert values(counts)["answers_total", "200"] == 2 and values(counts)["answers_total", "429"] == 1


def test_what_an_endpoint_counts() -> None:
    async def ask() -> None:
        async with endpoint() as (client, made, peer):
            body = {"model": NAME, "prompt": "ROMEO:", "max_tokens": 6, "temperature": 0}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            assert (await client.post("/v1/completions", json={**body, "max_tokens": 0})).status_code == 400
            assert (await client.get("/nothing")).status_code == 404
            found = {(sample.name, *sample.labels): sample.value for sample in made.samples()}
            assert found["cloven_tokens_total",] == 6 and found["cloven_computed_requests",] == 0
            assert [found["cloven_answers_total", status] for status in ("200", "400", "404")] == [1, 1, 1]
            assert found["cloven_session_open", NAME] == 1 and peer.attached == 1
            text = generate_latest(registry_of("serve", [made.samples])).decode()
            assert 'cloven_answers_total{status="200"} 1.0' in text and "ROMEO" not in text

    run(ask)
