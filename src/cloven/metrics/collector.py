"""Prometheus' view of samples: a registry of its own for every process, so that nothing else is published by accident."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cloven.metrics.catalog import BY_NAME, METRICS, ROLES, Sample, Source

Family = CounterMetricFamily | GaugeMetricFamily


class SampleCollector(Collector):
    """Asks its sources at every scrape.

    Args:
        sources: see `Source`; a name that is not in the catalogue is a KeyError.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)

    def collect(self) -> Iterator[Metric]:
        """One family for every name that there are samples of, in the catalogue's order."""
        families: dict[str, Family] = {}
        for source in self._sources:
            for sample in source():
                family = families.setdefault(sample.name, _family(sample.name))
                family.add_metric(sample.labels, sample.value)
        yield from (families[metric.name] for metric in METRICS if metric.name in families)


def _version() -> str:
    try:
        return version("cloven")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _family(name: str) -> Family:
    metric = BY_NAME[name]
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(name, metric.help, labels=metric.labels)


def registry_of(role: str, sources: Sequence[Source]) -> CollectorRegistry:
    """A registry with these sources, what the process is, and what prometheus_client says of it: CPU seconds, memory, descriptors, start.

    Args:
        role: one of `ROLES`.
    """
    if role not in ROLES:
        raise ValueError(f"{role!r} is no role")
    registry = CollectorRegistry()
    registry.register(SampleCollector([lambda: [Sample("cloven_process_info", 1.0, (role, _version()))], *sources]))
    ProcessCollector(registry=registry)
    return registry
