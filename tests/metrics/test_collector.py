from __future__ import annotations

import importlib.metadata

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cloven.metrics import collector
from cloven.metrics.catalog import BY_NAME, Sample
from cloven.metrics.collector import SampleCollector, registry_of


def test_samples_become_families_in_the_order_of_the_catalogue() -> None:
    def first() -> list[Sample]:
        return [Sample("cloven_waiting_requests", 2.0), Sample("cloven_rows_total", 5.0, ("lane",))]

    def second() -> list[Sample]:
        return [Sample("cloven_rows_total", 7.0, ("socket",))]

    families = list(SampleCollector([first, second]).collect())
    assert [(family.name, family.type) for family in families] == [("cloven_rows", "counter"), ("cloven_waiting_requests", "gauge")]
    assert [(sample.name, sample.labels, sample.value) for sample in families[0].samples] == [
        ("cloven_rows_total", {"way": "lane"}, 5.0),
        ("cloven_rows_total", {"way": "socket"}, 7.0),
    ]
    assert families[0].documentation == BY_NAME["cloven_rows_total"].help


def test_sources_are_asked_at_every_scrape() -> None:
    numbers = iter((1.0, 2.0))
    found = SampleCollector([lambda: [Sample("cloven_waiting_requests", next(numbers))]])
    assert [next(iter(found.collect())).samples[0].value for _ in range(2)] == [1.0, 2.0]


def test_a_name_that_is_not_documented_is_not_published() -> None:
    with pytest.raises(KeyError):
        list(SampleCollector([lambda: [Sample("cloven_prompt", 1.0)]]).collect())


def test_the_text_of_a_registry() -> None:
    label = 'a"b\\c\nd'
    text = generate_latest(registry_of("worker", [lambda: [Sample("cloven_session_rows_total", 5.0, (label,))]])).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["cloven_session_rows"].samples[0].labels == {"model": label}
    info = families["cloven_process_info"].samples[0]
    assert info.labels == {"role": "worker", "version": importlib.metadata.version("cloven")} and info.value == 1.0
    assert families["process_resident_memory_bytes"].samples[0].value > 2**20
    assert all(name.startswith(("cloven_", "process_")) for name in families)


def test_a_version_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(collector, "version", missing)
    assert 'version="unknown"' in generate_latest(registry_of("serve", [])).decode()


def test_a_role_that_is_none() -> None:
    with pytest.raises(ValueError, match="no role"):
        registry_of("painter", [])
