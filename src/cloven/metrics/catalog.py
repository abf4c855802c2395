"""The names of all metrics, in one place: docs/metrics.md has this table, and nothing else is published.

A `Sample` is one number under such a name. Whoever has numbers gives samples; `collector` makes Prometheus text of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge"]


@dataclass(frozen=True)
class Metric:
    """One name: counters only grow, and end in `_total`; `where` names the processes that have it."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    where: str
    help: str


@dataclass(frozen=True)
class Sample:
    """One number; `labels` are the values of the metric's labels, in their order."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


ROLES = ("worker", "enclave", "adapter-server", "serve", "session")  # of processes; "serve": the endpoint
Source = Callable[[], Iterable[Sample]]

_SERVERS, _ENCLAVE, _ADAPTER, _SESSION = "every server", "enclave", "adapter-server", "trusted side"
METRICS = (
    Metric("cloven_process_info", "gauge", ("role", "version"), "all", "1, with what the process is and the version of cloven."),
    Metric("cloven_exchanges_total", "counter", ("way",), _SERVERS, "Requests answered."),
    Metric("cloven_refused_total", "counter", ("code",), _SERVERS, "Requests that got an error answer, by the error's code."),
    Metric("cloven_rows_total", "counter", ("way",), _SERVERS, "Rows of activations in the requests answered."),
    Metric("cloven_received_bytes_total", "counter", ("way",), _SERVERS, "Bytes of requests, refused ones too, before CURVE and framing."),
    Metric("cloven_sent_bytes_total", "counter", ("way",), _SERVERS, "Bytes of answers, refusals too, before CURVE and framing."),
    Metric("cloven_work_seconds_total", "counter", ("way",), _SERVERS, "Seconds spent on requests; at the worker, on products."),
    Metric("cloven_wait_seconds_total", "counter", (), _SERVERS, "Seconds that requests waited for the one before them."),
    Metric("cloven_waiting_requests", "gauge", (), f"{_SERVERS}, serve", "Requests that wait for their turn now."),
    Metric("cloven_hellos_total", "counter", (), _SERVERS, "Greetings answered: every session begins with one."),
    Metric("cloven_connections", "gauge", (), _SERVERS, "Sockets open now, admitted or not yet."),
    Metric("cloven_connections_refused_total", "counter", (), _SERVERS, "Connections refused: an unlisted key, another user, too many."),
    Metric("cloven_lanes", "gauge", (), _SERVERS, "Lanes of shared memory open now."),
    Metric(
        "cloven_tokens_total",
        "counter",
        (),
        f"{_ENCLAVE}, serve",
        "Enclave: places of sequences that went through all layers, pads included; serve: tokens of answers.",
    ),
    Metric("cloven_answers_total", "counter", ("status",), "serve", "Answers by their HTTP status; 499: nobody was there any longer."),
    Metric("cloven_computed_requests", "gauge", (), "serve", "Requests that are computed now."),
    Metric("cloven_replicas", "gauge", (), "serve", "With --engine ray: replicas that there shall be."),
    Metric("cloven_replicas_live", "gauge", (), "serve", "With --engine ray: replicas that answer."),
    Metric("cloven_enclave_sessions", "gauge", (), _ENCLAVE, "Caches whose keys are held now."),
    Metric("cloven_enclave_sessions_opened_total", "counter", (), _ENCLAVE, "Caches that keys were drawn for."),
    Metric("cloven_ledger_usable", "gauge", ("adapter",), _ADAPTER, "1 where the adapter's ledger can be read, else 0."),
    Metric("cloven_ledger_budget_rows", "gauge", ("adapter",), _ADAPTER, "Rows of a matrix that all clients may have, ever."),
    Metric("cloven_ledger_left_rows", "gauge", ("adapter",), _ADAPTER, "What is left of them, of the matrix that was used most."),
    Metric("cloven_ledger_client_left_rows", "gauge", ("adapter", "client"), _ADAPTER, "What is left of a client's share, likewise."),
    Metric("cloven_session_open", "gauge", ("model",), _SESSION, "1 while the model's session is open, 0 when it has ended."),
    Metric("cloven_session_exchanges_total", "counter", ("model",), _SESSION, "Exchanges with workers, enclave or adapter server."),
    Metric("cloven_session_rows_total", "counter", ("model",), _SESSION, "Rows sent."),
    Metric("cloven_session_sent_bytes_total", "counter", ("model",), _SESSION, "Bytes of requests, before CURVE and framing."),
    Metric("cloven_session_received_bytes_total", "counter", ("model",), _SESSION, "Bytes of answers, before CURVE and framing."),
    Metric("cloven_session_wait_seconds_total", "counter", ("model",), _SESSION, "Seconds of waiting for answers."),
    Metric("cloven_session_round_trip_seconds_total", "counter", ("model",), _SESSION, "Seconds from requests to answers."),
    Metric("cloven_session_resent_total", "counter", ("model",), _SESSION, "Requests sent again because a connection was lost."),
    Metric("cloven_session_verification_failures_total", "counter", ("model",), _SESSION, "Answers and pads that failed their check."),
    Metric(
        "cloven_session_pads_ready",
        "gauge",
        ("model",),
        _SESSION,
        "Rows of pads (SLIP) or masks (private LoRA) made ahead, of the group that has fewest.",
    ),
    Metric(
        "cloven_session_pads_stored", "gauge", ("model",), _SESSION, "Rows of pads left in the pad store, of the group that has fewest."
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}
